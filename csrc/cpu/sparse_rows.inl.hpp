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
// Two or three times what a core gets from memory. With AVX2 int4 takes 9 operations for each plane of 8 lanes (24 bytes), 11
// with what ends a group; four units share them: 2.75 cycles at best, 9 bytes a cycle. Orders of activations made once a
// token (tables of 16 entries, one permute and no shift for the second slot) would save an operation a quad, but read 64 bytes
// of table for every 64 bytes of weights
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

// Codes: the same of vector v of each tile, into integer dot products, and what a set needs to know of the codes besides.
template <class S, Format F, int H, int R, int T>
GANGLINE_INLINE void add_codes(const std::uint8_t* const (&step)[R], const std::int8_t* const (&q)[T], int v,
                               typename S::Dot (&dot)[T][R], typename S::CodeSums (&sums)[R]) {
    const int begin = v * (64 / S::vectors);
    typename S::Bytes sixteen[T];
    for (int t = 0; t < T; ++t) sixteen[t] = S::template broadcast_bytes<F>(q[t]);
    unrolled<2>([&](auto index) GANGLINE_INLINE_LAMBDA {
        constexpr int plane = 2 * H + decltype(index)::value;
        for (int r = 0; r < R; ++r) {
            const auto places = S::template byte_places<2 * plane>(S::load(step[r] + begin));
            const auto codes = S::template codes<F, plane>(step[r] + position_bytes + begin);
            S::template sum_codes<F>(sums[r], codes);
            for (int t = 0; t < T; ++t) {
                S::template add_products<F>(dot[t][r], codes, S::pick_bytes(sixteen[t], places));
            }
        }
    });
}

// Asks the second-level cache for what one token will wait for, so many bytes ahead. Measured on Zen 4: into the first level is
// slower (but for weights that lie in the third), and so are less than 4096 bytes; with AVX-512 three tiles at once are fastest,
// with AVX2 one, which is a single stream of bytes.
template <Format F, int R>
GANGLINE_INLINE void prefetch_step(const std::uint8_t* const (&step)[R], std::ptrdiff_t ahead) {
#if defined(__GNUC__) || defined(__clang__)
    for (int r = 0; r < R; ++r) {
        for (int line = 0; line < sparse_step_bytes(F); line += 64)
            __builtin_prefetch(step[r] + ahead + line, 0, 2);
    }
#else
    static_cast<void>(step), static_cast<void>(ahead);
#endif
}

// R tiles times T tokens. Whole: segments are whole steps, which is the fast case; else they may end between halves.
template <class S, Format F, int A, int R, int T, bool Whole>
struct SparseBlock {
    static constexpr int V = S::vectors;
    static constexpr int lanes = sparse_lanes / V;
    static constexpr int kept = A == 0 ? most_accumulators : A;
    // The least that is not cut: halves a unit, columns of a unit.
    static constexpr int unit = Whole ? 2 : 1;
    static constexpr int unit_columns = unit * half_columns;
    using Floats = typename S::Floats;
    using Sums = Floats[T][R][V];

    const SparseLayout& layout;
    const Activations& x;
    const int token;
    const std::uint8_t* tiles[R];
    float tail[T][unit_columns];  // activations of a last unit that has fewer columns

    GANGLINE_INLINE SparseBlock(const Matrix& w, const SparseLayout& l, int tile, const Activations& rows, int first)
        : layout(l), x(rows), token(first) {
        for (int r = 0; r < R; ++r) tiles[r] = w.data + static_cast<std::size_t>(tile + r) * l.tile_bytes;
        const int left = rows.cols % unit_columns;
        if (has_codes(F) || left == 0) return;
        for (int t = 0; t < T; ++t) {
            const float* end = rows.x + (first + t) * rows.stride + rows.cols;
            for (int i = 0; i < unit_columns; ++i) tail[t][i] = i < left ? end[i - left] : 0.0F;
        }
    }

    GANGLINE_INLINE void at_unit(int index, const std::uint8_t* (&step)[R]) const {
        const std::ptrdiff_t begin = std::ptrdiff_t{index * unit / 2} * sparse_step_bytes(F);
        for (int r = 0; r < R; ++r) step[r] = tiles[r] + layout.steps_begin + begin;
    }

    // After unit `index`.
    GANGLINE_INLINE static void go_on(int index, const std::uint8_t* (&step)[R]) {
        for (int r = 0; r < R; ++r) step[r] += Whole || index % 2 != 0 ? sparse_step_bytes(F) : 0;
    }

    // How far ahead of a step the bytes are that its tile's worker will want: past the end of a tile the one that follows
    // those computed now.
    GANGLINE_INLINE std::ptrdiff_t ahead(int index) const {
        const std::ptrdiff_t tile = static_cast<std::ptrdiff_t>(layout.tile_bytes);
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(layout.steps_begin) + std::ptrdiff_t{index} * sparse_step_bytes(F);
        return S::prefetch_ahead + (R > 1 && at + S::prefetch_ahead >= tile ? (R - 1) * tile : 0);
    }

    // Units [index, end) of plain numbers, whose activations begin at from.
    GANGLINE_INLINE void numbers(int index, int end, const std::uint8_t* (&step)[R], const float* (&from)[T],
                                 Floats (&sum)[2][T][R][V]) const {
        for (; index < end; ++index) {
            if constexpr (Whole) {
                if constexpr (T == 1) prefetch_step<F, R>(step, ahead(index));
                const float* second[T];
                for (int t = 0; t < T; ++t) second[t] = from[t] + half_columns;
                add_numbers<S, F, 0, R, T>(step, from, sum);
                add_numbers<S, F, 1, R, T>(step, second, sum);
            } else if (index % 2 == 0) {
                add_numbers<S, F, 0, R, T>(step, from, sum);
            } else {
                add_numbers<S, F, 1, R, T>(step, from, sum);
            }
            for (int t = 0; t < T; ++t) from[t] += unit_columns;
            go_on(index, step);
        }
    }

    GANGLINE_INLINE void number_segment(int index, int end, Sums& total) const {
        Floats sum[2][T][R][V];
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) sum[0][t][r][v] = sum[1][t][r][v] = S::zero_floats();
        const std::uint8_t* step[R];
        at_unit(index, step);
        const float* from[T];
        for (int t = 0; t < T; ++t) from[t] = x.x + (token + t) * x.stride + index * unit_columns;
        const int filled = x.cols / unit_columns;
        numbers(index, end < filled ? end : filled, step, from, sum);
        if (end > filled) {
            for (int t = 0; t < T; ++t) from[t] = tail[t];
            numbers(filled, end, step, from, sum);
        }
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) total[t][r][v] = S::plus(sum[0][t][r][v], sum[1][t][r][v]);
    }

    GANGLINE_INLINE void add_segment(std::ptrdiff_t shifts, const Sums& total, Floats (&acc)[T][R][kept][V]) const {
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                for (int a = 0; a < (A == 0 ? layout.accumulators : A); ++a) {
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

    // One whole step of codes.
    GANGLINE_INLINE static void add_step(const std::uint8_t* const (&step)[R], const std::int8_t* const (&first)[T], int v,
                                         typename S::Dot (&dot)[T][R], typename S::CodeSums (&sums)[R]) {
        const std::int8_t* second[T];
        for (int t = 0; t < T; ++t) second[t] = first[t] + half_columns;
        add_codes<S, F, 0, R, T>(step, first, v, dot, sums);
        add_codes<S, F, 1, R, T>(step, second, v, dot, sums);
    }

    // Dot products of (a part of) an activation group, times both scales.
    GANGLINE_INLINE void add_group(int group, std::ptrdiff_t shifts, int v, const typename S::Dot (&dot)[T][R],
                                   const typename S::CodeSums (&sums)[R], Floats (&acc)[T][R][kept][V]) const {
        const std::ptrdiff_t groups = x.padded / sparse_activation_group;
        const std::ptrdiff_t scales = std::ptrdiff_t{group >> layout.group_shift} * sparse_lanes * 2;
        for (int r = 0; r < R; ++r) {
            const auto factor = S::load_halves(tiles[r] + scales + v * lanes * 2);
            for (int t = 0; t < T; ++t) {
                const auto scaled = S::times(factor, S::template to_floats<F>(dot[t][r], sums[r]));
                const auto scale = S::floats(x.scale[(token + t) * groups + group]);
                if constexpr (A == 1) {
                    acc[t][r][0][v] = S::fused(scaled, scale, acc[t][r][0][v]);
                } else {
                    for (int a = 0; a < (A == 0 ? layout.accumulators : A); ++a) {
                        const auto here = S::where(tiles[r] + shifts + v * lanes, a);
                        acc[t][r][a][v] = S::fused_where(here, scaled, scale, acc[t][r][a][v]);
                    }
                }
            }
        }
    }

    // `count` units of codes, which share all their scales. Of whole steps there are Steps. One vector after the other, so that
    // few registers are needed at a time.
    template <int Steps>
    GANGLINE_INLINE void add_units(int index, int count, int group, std::ptrdiff_t shifts, const std::uint8_t* (&step)[R],
                                   const std::int8_t* (&from)[T], Floats (&acc)[T][R][kept][V]) const {
        unrolled<V>([&](auto vector) GANGLINE_INLINE_LAMBDA {
            constexpr int v = decltype(vector)::value;
            typename S::Dot dot[T][R];
            typename S::CodeSums sums[R];
            for (int r = 0; r < R; ++r) {
                sums[r] = S::no_codes();
                for (int t = 0; t < T; ++t) dot[t][r] = S::no_products();
            }
            const std::uint8_t* at[R];
            const std::int8_t* q[T];
            for (int r = 0; r < R; ++r) at[r] = step[r];
            for (int t = 0; t < T; ++t) q[t] = from[t];
            if constexpr (Steps > 0) {
                unrolled<Steps>([&](auto number) GANGLINE_INLINE_LAMBDA {
                    if constexpr (T == 1 && v == 0) prefetch_step<F, R>(at, ahead(index + decltype(number)::value));
                    add_step(at, q, v, dot, sums);
                    for (int r = 0; r < R; ++r) at[r] += sparse_step_bytes(F);
                    for (int t = 0; t < T; ++t) q[t] += unit_columns;
                });
            } else {
                for (int i = index; i < index + count; ++i) {
                    if (i % 2 == 0) add_codes<S, F, 0, R, T>(at, q, v, dot, sums);
                    else add_codes<S, F, 1, R, T>(at, q, v, dot, sums);
                    go_on(i, at);
                    for (int t = 0; t < T; ++t) q[t] += unit_columns;
                }
            }
            add_group(group, shifts, v, dot, sums, acc);
            if constexpr (v == V - 1) {
                for (int r = 0; r < R; ++r) step[r] = at[r];
                for (int t = 0; t < T; ++t) from[t] = q[t];
            }
        });
    }

    GANGLINE_INLINE void code_segment(int index, int end, std::ptrdiff_t shifts, Floats (&acc)[T][R][kept][V]) const {
        constexpr int group_units = 4 / unit;  // of activations
        const std::uint8_t* step[R];
        at_unit(index, step);
        const std::int8_t* from[T];
        for (int t = 0; t < T; ++t) from[t] = x.q + std::ptrdiff_t{token + t} * x.padded + index * unit_columns;
        while (index < end) {
            const int group = index / group_units;
            const int group_end = (group + 1) * group_units;
            const int count = (end < group_end ? end : group_end) - index;
            if constexpr (!Whole) add_units<0>(index, count, group, shifts, step, from, acc);
            else if (count == group_units) add_units<group_units>(index, count, group, shifts, step, from, acc);
            else add_units<1>(index, count, group, shifts, step, from, acc);
            index += count;
        }
    }

    GANGLINE_INLINE void multiply(Floats (&acc)[T][R][kept][V]) const {
        const int count = A == 0 ? layout.accumulators : A;
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r)
                for (int a = 0; a < count; ++a)
                    for (int v = 0; v < V; ++v) acc[t][r][a][v] = S::zero_floats();
        const int units = (layout.halves + unit - 1) / unit;
        const int of_segment = A == 1 ? units : layout.segment_halves / unit;
        std::ptrdiff_t shifts = static_cast<std::ptrdiff_t>(layout.shifts_begin);
        for (int index = 0; index < units; index += of_segment, shifts += sparse_lanes) {
            const int end = index + of_segment < units ? index + of_segment : units;
            if constexpr (has_codes(F)) {
                code_segment(index, end, shifts, acc);
            } else {
                Sums total;
                number_segment(index, end, total);
                add_segment(shifts, total, acc);
            }
        }
    }
};

// R tiles from `tile` on times T tokens from `token` on. A function of its own: inlined, the many copies would share and
// spill registers.
template <class S, Format F, int A, int R, int T, bool Whole>
GANGLINE_APART void multiply_sparse(const Matrix& w, const SparseLayout& layout, int tile, RowRange wanted,
                                    const Activations& x, int token, float* y, std::ptrdiff_t y_stride) {
    using Block = SparseBlock<S, F, A, R, T, Whole>;
    typename S::Floats acc[T][R][Block::kept][S::vectors];
    const Block block(w, layout, tile, x, token);
    block.multiply(acc);
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

template <class S, Format F, int A, bool Whole, int T>
GANGLINE_INLINE int sparse_tokens(const Matrix& w, const SparseLayout& layout, int tile, RowRange wanted, const Activations& x,
                                  int begin, float* y, std::ptrdiff_t y_stride) {
    for (; begin + T <= x.tokens; begin += T) {
        multiply_sparse<S, F, A, 1, T, Whole>(w, layout, tile, wanted, x, begin, y, y_stride);
    }
    return begin;
}

template <class S, Format F, int A, bool Whole>
GANGLINE_INLINE void sparse_rows(const Matrix& w, const SparseLayout& layout, RowRange wanted, const Activations& x, float* y,
                                 std::ptrdiff_t y_stride) {
    constexpr int together = Whole && A != 0 ? S::sparse_streams : 1;
    int tile = wanted.begin / layout.rows;
    const int end = (wanted.end + layout.rows - 1) / layout.rows;
    if (x.tokens == 1) {
        for (; tile + together <= end; tile += together) {
            multiply_sparse<S, F, A, together, 1, Whole>(w, layout, tile, wanted, x, 0, y, y_stride);
        }
    }
    for (; tile < end; ++tile) {
        int t = 0;
        if constexpr (Whole) t = sparse_tokens<S, F, A, Whole, S::sparse_tokens>(w, layout, tile, wanted, x, t, y, y_stride);
        t = sparse_tokens<S, F, A, Whole, 2>(w, layout, tile, wanted, x, t, y, y_stride);
        sparse_tokens<S, F, A, Whole, 1>(w, layout, tile, wanted, x, t, y, y_stride);
    }
}

template <class S, Format F>
void sparse_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const SparseLayout layout = SparseLayout::of(w);
    const RowRange wanted{row_begin, row_end};
    if (layout.accumulators == 1) return sparse_rows<S, F, 1, true>(w, layout, wanted, x, y, y_stride);
    if (layout.segment_halves % 2 != 0) return sparse_rows<S, F, 0, false>(w, layout, wanted, x, y, y_stride);
    if (layout.accumulators == 2) return sparse_rows<S, F, 2, true>(w, layout, wanted, x, y, y_stride);
    return sparse_rows<S, F, 0, true>(w, layout, wanted, x, y, y_stride);
}

}  // namespace
}  // namespace gangline
