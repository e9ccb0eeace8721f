// y = x W^T for sparse tiles (sparse_layout.hpp), written once for all vector instruction sets; `S` as in sparse_*.hpp. The
// dense matrix is never made: the activations go to the weights. A lane is a compressed row; for each quad of columns a
// permute inside 128 bits, steered by two bits of the lane's word, gives every lane the activation of its own column.
//
// Cost of one token with AVX-512, counted in operations on 64 bytes, of which Zen 4 does two a cycle, and shifts and
// permutes only one:
//   bf16  64 bytes of values (a quad): 2 shifts and 2 permutes for the activations, 1 shift and 1 "and" for the values,
//         2 fused multiply-adds: 8 operations; the 5 shifts and permutes bind, 5 cycles, 13 bytes a cycle.
//   int4  128 bytes of codes and 64 of positions (a step): for each of 4 planes 2 operations for the index, 1 permute, 1.5
//         for the codes, 2 dot products (the second adds up what the unsigned codes are too large by): 26 operations, 13
//         cycles, 14 bytes a cycle.
// Two or three times what a core gets from memory. Order of activations made once a token (tables of 16 entries, one permute
// and no shift for the second slot) would save an operation a quad, but read 64 bytes of table for every 64 bytes of weights
// from the second-level cache; pairs of bf16 would halve the rest, but round the activations.
//
// Order of the sums, for one token as for many: plain numbers have one sum for the first value of every quad and one for
// the second, which start at zero in every segment; both are added, then added to the accumulator of the output row. Codes:
// exact integer dot products of at most 64 columns, and no more than the segment; times both scales into one sum.
//
// Legend: R tiles and T tokens are computed together; S::vectors vectors hold the 16 lanes of a tile; A accumulators (0: as
// many as the layout says, in memory).
#pragma once

#include <cstring>

#include "sparse_layout.hpp"
#include "sparse_sums.inl.hpp"
#include "tile_rows.inl.hpp"

namespace gangline {
namespace {

constexpr bool has_codes(Format format) { return format == Format::sparse_int8 || format == Format::sparse_int4; }

// Plain numbers: half H (0 or 1) of a step; x: the 16 activations of each token.
template <class S, Format F, int H, int R, int T>
GANGLINE_INLINE void add_numbers(const std::uint8_t* const (&step)[R], const float* const (&x)[T],
                                 typename S::Floats (&sum)[2][T][R][S::vectors]) {
    constexpr int V = S::vectors;
    constexpr int bytes = 64 / V;
    unrolled<4>([&](auto index) GANGLINE_INLINE_LAMBDA {
        constexpr int i = decltype(index)::value;
        constexpr int shift = 8 * i + 4 * H;
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                const auto words = S::load(step[r] + v * bytes);
                const auto first = S::template shift_words<shift>(words);
                const auto second = S::template shift_words<shift + 2>(words);
                const auto values = S::template numbers<F>(step[r] + position_bytes + (4 * H + i) * 64 + v * bytes);
                for (int t = 0; t < T; ++t) {
                    const auto four = S::broadcast_floats(x[t] + 4 * i);
                    sum[0][t][r][v] = S::fused(values.first, S::pick(four, first), sum[0][t][r][v]);
                    sum[1][t][r][v] = S::fused(values.second, S::pick(four, second), sum[1][t][r][v]);
                }
            }
        }
    });
}

// Codes: the same, into integer dot products.
template <class S, Format F, int H, int R, int T>
GANGLINE_INLINE void add_codes(const std::uint8_t* const (&step)[R], const std::int8_t* const (&q)[T],
                               typename S::Dot (&dot)[T][R][S::vectors]) {
    constexpr int V = S::vectors;
    constexpr int bytes = 64 / V;
    unrolled<2>([&](auto index) GANGLINE_INLINE_LAMBDA {
        constexpr int plane = 2 * H + decltype(index)::value;
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                const auto places = S::template byte_places<2 * plane>(S::load(step[r] + v * bytes));
                const std::uint8_t* values = step[r] + position_bytes + v * bytes;
                const auto codes = S::template codes<F, plane>(values);
                for (int t = 0; t < T; ++t) {
                    S::template add_products<F>(dot[t][r][v], codes, S::pick_bytes(S::broadcast_bytes(q[t]), places));
                }
            }
        }
    });
}

// What a block of R tiles and T tokens works with.
template <class S, Format F, int A, int R, int T>
struct SparseBlock {
    static constexpr int V = S::vectors;
    static constexpr int lanes = sparse_lanes / V;
    static constexpr int kept = A == 0 ? most_accumulators : A;
    static constexpr bool streams = T == 1;
    using Floats = typename S::Floats;

    const SparseLayout& layout;
    const std::uint8_t* tiles[R];

    GANGLINE_INLINE void at_half(int half, const std::uint8_t* (&step)[R]) const {
        const std::size_t begin = layout.steps_begin + static_cast<std::size_t>(half / 2) * layout.step_bytes;
        for (int r = 0; r < R; ++r) step[r] = tiles[r] + begin;
    }

    // Asks for what comes next: one token waits for memory.
    GANGLINE_INLINE void prefetch_step(const std::uint8_t* const (&step)[R]) const {
#if defined(__GNUC__) || defined(__clang__)
        if constexpr (streams) {
            constexpr int bytes = position_bytes + sparse_lanes * sparse_value_bits(F) * sparse_step_columns / 16;
            for (int r = 0; r < R; ++r)
                for (int line = 0; line < bytes; line += 64) __builtin_prefetch(step[r] + S::prefetch_ahead + line);
        }
#endif
    }

    // Halves [half, stop) of plain numbers; x begins at `half`.
    GANGLINE_INLINE void numbers(int half, int stop, const float* (&x)[T], Floats (&sum)[2][T][R][V]) const {
        const std::uint8_t* step[R];
        while (half < stop) {
            at_half(half, step);
            int did = 1;
            if (half % 2 != 0) {
                add_numbers<S, F, 1, R, T>(step, x, sum);
            } else {
                prefetch_step(step);
                add_numbers<S, F, 0, R, T>(step, x, sum);
                if (half + 1 < stop) {
                    for (int t = 0; t < T; ++t) x[t] += half_columns;
                    add_numbers<S, F, 1, R, T>(step, x, sum);
                    did = 2;
                }
            }
            for (int t = 0; t < T; ++t) x[t] += half_columns;
            half += did;
        }
    }

    // Halves [half, stop) of codes, which share their scales.
    GANGLINE_INLINE void codes(int half, int stop, const Activations& x, int token, Floats (&sum)[T][R][V]) const {
        const std::uint8_t* step[R];
        const std::int8_t* q[T];
        typename S::Dot dot[T][R][V];
        const int group = half / 4;
        const std::size_t scales = static_cast<std::size_t>(half / layout.group_halves) * sparse_lanes * 2;
        for (int t = 0; t < T; ++t) {
            q[t] = x.q + std::ptrdiff_t{token + t} * x.padded + half * half_columns;
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) dot[t][r][v] = S::no_products();
        }
        while (half < stop) {
            at_half(half, step);
            int did = 1;
            if (half % 2 != 0) {
                add_codes<S, F, 1, R, T>(step, q, dot);
            } else {
                prefetch_step(step);
                add_codes<S, F, 0, R, T>(step, q, dot);
                if (half + 1 < stop) {
                    for (int t = 0; t < T; ++t) q[t] += half_columns;
                    add_codes<S, F, 1, R, T>(step, q, dot);
                    did = 2;
                }
            }
            for (int t = 0; t < T; ++t) q[t] += half_columns;
            half += did;
        }
        const std::ptrdiff_t groups = x.padded / sparse_activation_group;
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                const auto factor = S::load_halves(tiles[r] + scales + v * lanes * 2);
                for (int t = 0; t < T; ++t) {
                    const auto scaled = S::times(factor, S::to_floats(dot[t][r][v]));
                    sum[t][r][v] = S::fused(scaled, S::floats(x.scale[(token + t) * groups + group]), sum[t][r][v]);
                }
            }
        }
    }

    // Sums of one segment, halves [half, end).
    GANGLINE_INLINE void segment(int half, int end, const Activations& x, int token, const float (&tail)[T][half_columns],
                                 Floats (&total)[T][R][V]) const {
        if constexpr (has_codes(F)) {
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) total[t][r][v] = S::zero_floats();
            while (half < end) {
                const int group_end = (half / 4 + 1) * 4;
                const int stop = end < group_end ? end : group_end;
                codes(half, stop, x, token, total);
                half = stop;
            }
        } else {
            Floats sum[2][T][R][V];
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) sum[0][t][r][v] = sum[1][t][r][v] = S::zero_floats();
            const int whole = x.cols / half_columns;
            const int stop = end < whole ? end : whole;
            const float* from[T];
            for (int t = 0; t < T; ++t) from[t] = x.x + (token + t) * x.stride + half * half_columns;
            numbers(half, stop, from, sum);
            if (stop < end) {
                for (int t = 0; t < T; ++t) from[t] = tail[t];
                numbers(stop, end, from, sum);
            }
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) total[t][r][v] = S::plus(sum[0][t][r][v], sum[1][t][r][v]);
        }
    }

    GANGLINE_INLINE void multiply(const Activations& x, int token, Floats (&acc)[T][R][kept][V]) const {
        const int count = A == 0 ? layout.accumulators : A;
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r)
                for (int a = 0; a < count; ++a)
                    for (int v = 0; v < V; ++v) acc[t][r][a][v] = S::zero_floats();
        float tail[T][half_columns];
        if (const int left = x.cols % half_columns; !has_codes(F) && left != 0) {
            for (int t = 0; t < T; ++t) {
                const float* end = x.x + (token + t) * x.stride + x.cols;
                for (int i = 0; i < half_columns; ++i) tail[t][i] = i < left ? end[i - left] : 0.0F;
            }
        }
        std::size_t shifts = layout.shifts_begin;
        for (int half = 0; half < layout.halves; half += layout.segment_halves, shifts += sparse_lanes) {
            const int end = half + layout.segment_halves < layout.halves ? half + layout.segment_halves : layout.halves;
            Floats total[T][R][V];
            segment(half, end, x, token, tail, total);
            for (int r = 0; r < R; ++r) {
                for (int v = 0; v < V; ++v) {
                    for (int a = 0; a < count; ++a) {
                        if constexpr (A == 1) {
                            for (int t = 0; t < T; ++t) acc[t][r][a][v] = total[t][r][v];
                        } else {
                            const auto here = S::where(tiles[r] + shifts + v * lanes, a);
                            for (int t = 0; t < T; ++t) acc[t][r][a][v] = S::add_where(acc[t][r][a][v], here, total[t][r][v]);
                        }
                    }
                }
            }
        }
    }
};

// R tiles from `tile` on times T tokens from `token` on. A function of its own: inlined, the many copies would share and
// spill registers.
template <class S, Format F, int A, int R, int T>
GANGLINE_APART void multiply_sparse(const Matrix& w, const SparseLayout& layout, int tile, RowRange wanted,
                                    const Activations& x, int token, float* y, std::ptrdiff_t y_stride) {
    using Block = SparseBlock<S, F, A, R, T>;
    Block block{layout, {}};
    for (int r = 0; r < R; ++r) block.tiles[r] = w.data + static_cast<std::size_t>(tile + r) * layout.tile_bytes;
    typename S::Floats acc[T][R][Block::kept][S::vectors];
    block.multiply(x, token, acc);
    float sums[Block::kept * sparse_lanes];
    const int count = A == 0 ? layout.accumulators : A;
    for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
            for (int a = 0; a < count; ++a)
                for (int v = 0; v < S::vectors; ++v) S::store(sums + a * sparse_lanes + v * Block::lanes, acc[t][r][a][v]);
            store_sums(sums, w.sparse, layout, tile + r, wanted, y + (token + t) * y_stride);
        }
    }
}

template <class S, Format F, int A, int T>
GANGLINE_INLINE int sparse_tokens(const Matrix& w, const SparseLayout& layout, int tile, RowRange wanted, const Activations& x,
                                  int begin, float* y, std::ptrdiff_t y_stride) {
    for (; begin + T <= x.tokens; begin += T) {
        multiply_sparse<S, F, A, 1, T>(w, layout, tile, wanted, x, begin, y, y_stride);
    }
    return begin;
}

template <class S, Format F, int A>
GANGLINE_INLINE void sparse_rows(const Matrix& w, const SparseLayout& layout, RowRange wanted, const Activations& x, float* y,
                                 std::ptrdiff_t y_stride) {
    constexpr int together = A == 0 ? 1 : S::template sparse_streams<F>;
    int tile = wanted.begin / layout.rows;
    const int end = (wanted.end + layout.rows - 1) / layout.rows;
    if (x.tokens == 1) {
        for (; tile + together <= end; tile += together) {
            multiply_sparse<S, F, A, together, 1>(w, layout, tile, wanted, x, 0, y, y_stride);
        }
    }
    for (; tile < end; ++tile) {
        int t = sparse_tokens<S, F, A, 4>(w, layout, tile, wanted, x, 0, y, y_stride);
        t = sparse_tokens<S, F, A, 2>(w, layout, tile, wanted, x, t, y, y_stride);
        sparse_tokens<S, F, A, 1>(w, layout, tile, wanted, x, t, y, y_stride);
    }
}

template <class S, Format F>
void sparse_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const SparseLayout layout = SparseLayout::of(w);
    const RowRange wanted{row_begin, row_end};
    switch (layout.accumulators) {
        case 1: return sparse_rows<S, F, 1>(w, layout, wanted, x, y, y_stride);
        case 2: return sparse_rows<S, F, 2>(w, layout, wanted, x, y, y_stride);
        default: return sparse_rows<S, F, 0>(w, layout, wanted, x, y, y_stride);
    }
}

}  // namespace
}  // namespace gangline
