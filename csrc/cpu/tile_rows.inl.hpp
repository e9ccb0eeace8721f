// y = x W^T for tiled weights and int8 activations, written once for all vector instruction sets. The including file gives a
// set `S` (see tile_*.hpp); everything here has internal linkage, so that no wide code leaves its translation unit.
//
// Legend: R row blocks of 16 and T tokens are computed together; S::vectors vectors hold the 16 rows of a block.
#pragma once

#include <type_traits>

#include "tile_layout.hpp"

#if defined(__GNUC__) || defined(__clang__)
#define GANGLINE_INLINE inline __attribute__((always_inline))
#define GANGLINE_INLINE_LAMBDA __attribute__((always_inline))
#define GANGLINE_APART __attribute__((noinline))
#else
#define GANGLINE_INLINE inline
#define GANGLINE_INLINE_LAMBDA
#define GANGLINE_APART
#endif

namespace gangline {
namespace {

// Calls body(0), ..., body(N - 1) with compile-time numbers: shifts and flushes depend on them.
template <int N, class Body>
GANGLINE_INLINE void unrolled(Body&& body) {
    if constexpr (N > 0) {
        unrolled<N - 1>(body);
        body(std::integral_constant<int, N - 1>{});
    }
}

// How many products of code pairs (each at most 2 * largest code * 127) fit in 16 bits before they must be widened.
constexpr int products_in_16_bits(Format format) {
    switch (format) {
        case Format::tile_int8: return 1;
        case Format::tile_int6: return 2;
        case Format::tile_mxfp4: return 4;
        default: return 8;
    }
}

// Where the codes of one step (32 columns of a group) lie. `high` is for int3 and int6 only.
struct Step {
    const std::uint8_t* codes;
    const std::uint8_t* high;
};

// Bytes from one step's codes to the next's, of formats whose bits lie together.
template <Format F>
constexpr std::ptrdiff_t step_bytes() {
    return std::ptrdiff_t{step_columns} * tile_rows * code_bits(F) / 8;
}

template <Format F>
GANGLINE_INLINE Step step_of(const std::uint8_t* group_codes, int group, int step) {
    constexpr Format low = F == Format::tile_int3 ? Format::tile_int2 : F == Format::tile_int6 ? Format::tile_int4 : F;
    constexpr std::ptrdiff_t high_bytes = step_columns * tile_rows * (code_bits(F) - code_bits(low)) / 8;
    return {group_codes + step * step_bytes<low>(),
            group_codes + std::ptrdiff_t{group} * tile_rows * code_bits(low) / 8 + step * high_bytes};
}

// Quad I of a step: one byte a code, for vector `v` of the row block.
template <class S, Format F, int I>
GANGLINE_INLINE typename S::Bytes unpack(const Step& at, int v) {
    constexpr int bytes = quad_bytes / S::vectors;
    if constexpr (F == Format::tile_int8) {
        return S::load(at.codes + I * quad_bytes + v * bytes);
    } else if constexpr (F == Format::tile_int2 || F == Format::tile_int3) {
        const auto packed = S::load(at.codes + I / 4 * quad_bytes + v * bytes);
        const auto low = S::bit_and(S::template shift_right<2 * (I % 4)>(packed), S::splat(3));
        if constexpr (F == Format::tile_int2) {
            return low;
        } else {
            const auto high = S::template shift_right<I - 2>(S::load(at.high + v * bytes));
            return S::bit_or(low, S::bit_and(high, S::splat(4)));
        }
    } else if constexpr (F == Format::tile_int6) {
        const auto low = S::bit_and(S::template shift_right<4 * (I % 2)>(S::load(at.codes + I / 2 * quad_bytes + v * bytes)),
                                    S::splat(15));
        const auto high = S::template shift_right<2 * (I % 4) - 4>(S::load(at.high + I / 4 * quad_bytes + v * bytes));
        return S::bit_or(low, S::bit_and(high, S::splat(48)));
    } else {
        const auto packed = S::load(at.codes + I / 2 * quad_bytes + v * bytes);
        const auto code = S::bit_and(S::template shift_right<4 * (I % 2)>(packed), S::splat(15));
        if constexpr (F == Format::tile_mxfp4) {
            return S::doubled_e2m1(code);
        } else {
            return code;
        }
    }
}

// Calls body(t, r, v, i, weights, activations) for all products of quad i, and so for every quad of a step.
template <class S, Format F, int R, int T, class Body>
GANGLINE_INLINE void for_products(const Step (&at)[R], const std::int8_t* x, std::ptrdiff_t x_stride, Body&& body) {
    constexpr int V = S::vectors;
    unrolled<step_quads>([&](auto i) GANGLINE_INLINE_LAMBDA {
        typename S::template Weights<F> w[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) w[r][v] = S::template prepare<F>(unpack<S, F, decltype(i)::value>(at[r], v));
        for (int t = 0; t < T; ++t) {
            const auto four = S::broadcast4(x + t * x_stride + quad_columns * decltype(i)::value);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) body(t, r, v, i, w[r][v], four);
        }
    });
}

// Integer dot products of one group, without the zero points, added to `dot`.
template <class S, Format F, int R, int T>
GANGLINE_INLINE void dot_group(const std::uint8_t* const (&codes)[R], int group, const std::int8_t* q,
                               std::ptrdiff_t q_stride, typename S::Ints (&dot)[T][R][S::vectors]) {
    constexpr int flush = products_in_16_bits(F);
    for (int step = 0; step < group / step_columns; ++step) {
        typename S::Partial partial[T][R][S::vectors];
        Step at[R];
        for (int r = 0; r < R; ++r) at[r] = step_of<F>(codes[r], group, step);
        for_products<S, F, R, T>(at, q + step * step_columns, q_stride,
                                 [&](int t, int r, int v, auto index, auto w, auto four) GANGLINE_INLINE_LAMBDA {
            constexpr int i = decltype(index)::value;
            S::template add_products<i % flush == 0, i % flush == flush - 1>(dot[t][r][v], partial[t][r][v], w, four);
        });
    }
}

// Where scales are bytes and groups a step, sets that add products in 16 bits keep a whole group there, zero point and all
// (the sum is at most 30480: half of 32 products of a code and 127), and widen by the multiplication with the scale.
template <class S, Format F>
constexpr bool gathers_groups() {
    return S::gathers && code_bits(F) <= 4 && F != Format::tile_mxfp4;
}

// Dot products of one group, times the weights' scales: the numbers of dot_group and load_factors, exactly.
template <class S, Format F, int R, int T>
GANGLINE_INLINE void gather_group(const std::uint8_t* const (&codes)[R], const std::uint8_t* scales, std::size_t block_bytes,
                                  const std::int8_t* q, std::ptrdiff_t q_stride, const std::int32_t* sum,
                                  std::ptrdiff_t groups, typename S::Ints (&scaled)[T][R][S::vectors]) {
    constexpr int V = S::vectors;
    typename S::Partial partial[T][R][V];
    for (int t = 0; t < T; ++t) {
        // Half of the zero point for each half of a pair.
        const auto start = S::template minus_shifted<code_bits(F) - 2>(sum[t * groups]);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) partial[t][r][v] = start;
    }
    Step at[R];
    for (int r = 0; r < R; ++r) at[r] = step_of<F>(codes[r], step_columns, 0);
    for_products<S, F, R, T>(at, q, q_stride, [&](int t, int r, int v, auto, auto w, auto four) GANGLINE_INLINE_LAMBDA {
        S::gather(partial[t][r][v], w, four);
    });
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            const auto factor = S::load_pair_scales(scales + static_cast<std::size_t>(r) * block_bytes, v * (tile_rows / V));
            for (int t = 0; t < T; ++t) scaled[t][r][v] = S::widen(partial[t][r][v], factor);
        }
}

// A set that must see int8 codes as signed numbers has taken 128 from each.
template <class S, Format F>
constexpr int zero_shift() {
    return F == Format::tile_int8 && S::signed_bytes ? 128 : 0;
}

// Starts every dot product at -zero * sum of the activations.
template <class S, Format F, int R, int T>
GANGLINE_INLINE void start_group(const std::uint8_t* zeros, std::size_t block_bytes, bool has_zeros, const std::int32_t* sum,
                                 std::ptrdiff_t groups, typename S::Ints (&dot)[T][R][S::vectors]) {
    constexpr int V = S::vectors;
    for (int t = 0; t < T; ++t) {
        if (F != Format::tile_mxfp4 && has_zeros) {
            const auto negative = S::ints(-sum[t * groups]);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    const std::uint8_t* at = zeros + static_cast<std::size_t>(r) * block_bytes + v * (tile_rows / V);
                    dot[t][r][v] = S::multiply(S::load_zeros(at, zero_shift<S, F>()), negative);
                }
        } else {
            const auto start = S::ints(-(code_zero(F) - zero_shift<S, F>()) * sum[t * groups]);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) dot[t][r][v] = start;
        }
    }
}

// The scales of one group; byte scales without those of their rows, so that their products with a dot product are exact.
template <class S, Format F, bool ByteScales>
GANGLINE_INLINE typename S::Floats load_factors(const std::uint8_t* scales, int at) {
    if constexpr (ByteScales) return S::load_byte_scales(scales, at);
    else return S::template load_scales<F>(scales, at);
}

template <class S, int V>
GANGLINE_INLINE void store_rows(float* y, const typename S::Floats (&acc)[V], int rows) {
    constexpr int lanes = tile_rows / V;
    if (rows == tile_rows) {
        for (int v = 0; v < V; ++v) S::store(y + v * lanes, acc[v]);
        return;
    }
    float part[tile_rows];
    for (int v = 0; v < V; ++v) S::store(part + v * lanes, acc[v]);
    for (int r = 0; r < rows; ++r) y[r] = part[r];
}

// What the scales of the weights are: fp16 numbers (E8M0 for mxfp4); bytes; or bytes of groups that gather_group can take.
enum class Scales { halves, bytes, gathered };

// R row blocks from `block` on times T tokens from `token` on. The last block has `last_rows` rows.
// A function of its own: inlined, the many copies would share and spill registers.
template <class S, Format F, Scales K, int R, int T>
GANGLINE_APART void multiply_block(const Matrix& w, const TileLayout& tile, const std::uint8_t* block, const Activations& x, int token,
                    float* y, std::ptrdiff_t y_stride, int last_rows) {
    constexpr int V = S::vectors;
    constexpr int lanes = tile_rows / V;
    typename S::Floats acc[T][R][V];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[t][r][v] = S::zero_floats();
    const std::ptrdiff_t groups = tile.groups;
    const std::int8_t* q = x.q + std::ptrdiff_t{token} * x.padded;
    const float* scale = x.scale + token * groups;
    const std::int32_t* sum = x.sum + token * groups;
    const std::uint8_t* stripe = block + tile.row_scale_bytes;
    for (int first = 0; first < tile.groups; first += stripe_groups, stripe += tile.stripe_bytes) {
        const int count = tile.groups_from(first);
        const std::uint8_t* scales = stripe;
        const std::uint8_t* zeros = stripe + tile.zeros_begin(count);
        const std::uint8_t* group_codes = stripe + tile.head_bytes(count);
        for (int g = first; g < first + count; ++g) {
            const std::uint8_t* codes[R];
            for (int r = 0; r < R; ++r) codes[r] = group_codes + static_cast<std::size_t>(r) * tile.block_bytes;
            typename S::Ints dot[T][R][V];
            if constexpr (K == Scales::gathered) {
                gather_group<S, F, R, T>(codes, scales, tile.block_bytes, q + std::ptrdiff_t{g} * step_columns, x.padded, sum + g,
                                         groups, dot);
                for (int t = 0; t < T; ++t)
                    for (int r = 0; r < R; ++r)
                        for (int v = 0; v < V; ++v)
                            acc[t][r][v] = S::fused(S::to_floats(dot[t][r][v]), S::floats(scale[t * groups + g]), acc[t][r][v]);
            } else {
                start_group<S, F, R, T>(zeros, tile.block_bytes, w.has_zeros, sum + g, groups, dot);
                dot_group<S, F, R, T>(codes, w.group, q + std::ptrdiff_t{g} * w.group, x.padded, dot);
                for (int r = 0; r < R; ++r) {
                    for (int v = 0; v < V; ++v) {
                        const auto factor = load_factors<S, F, K == Scales::bytes>(scales + static_cast<std::size_t>(r) * tile.block_bytes, v * lanes);
                        for (int t = 0; t < T; ++t) {
                            const auto scaled = S::times(factor, S::to_floats(dot[t][r][v]));
                            acc[t][r][v] = S::fused(scaled, S::floats(scale[t * groups + g]), acc[t][r][v]);
                        }
                    }
                }
            }
            scales += tile_rows * tile.entry_bytes;
            zeros += tile_rows;
            group_codes += tile.group_bytes;
        }
    }
    if constexpr (K != Scales::halves) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                const auto of_row = S::load_floats(block + static_cast<std::size_t>(r) * tile.block_bytes, v * lanes);
                for (int t = 0; t < T; ++t) acc[t][r][v] = S::times(acc[t][r][v], of_row);
            }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r)
            store_rows<S, V>(y + (token + t) * y_stride + r * tile_rows, acc[t][r], r == R - 1 ? last_rows : tile_rows);
}

// Bytes that come next, asked for a little at a time while what came before is in use: a row block is read once and then
// computed with for so long that the processor's own look ahead has ended.
struct Ahead {
    const std::uint8_t* next = nullptr;
    const std::uint8_t* end = nullptr;
    std::ptrdiff_t step = 0;

    GANGLINE_INLINE void ask() {
#if defined(__GNUC__) || defined(__clang__)
        const std::uint8_t* stop = end - next < step ? end : next + step;
        for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
#endif
    }
};

// All tokens in [begin, end), the widest register blocks first.
template <class S, Format F, Scales K, int R, int T>
GANGLINE_INLINE int multiply_tokens(const Matrix& w, const TileLayout& tile, const std::uint8_t* block, const Activations& x,
                                    int begin, int end, float* y, std::ptrdiff_t y_stride, int last_rows, Ahead& ahead) {
    for (; begin + T <= end; begin += T) {
        ahead.ask();
        multiply_block<S, F, K, R, T>(w, tile, block, x, begin, y, y_stride, last_rows);
    }
    if constexpr (T > 1) {
        return multiply_tokens<S, F, K, R, (T > 4 ? 4 : T > 2 ? 2 : 1)>(w, tile, block, x, begin, end, y, y_stride, last_rows, ahead);
    }
    return begin;
}

// Tokens whose activations stay in the second-level cache while all row blocks pass by.
inline int tokens_in_cache(int padded) {
    constexpr int bytes = 256 * 1024;
    const int tokens = bytes / padded;
    return tokens < 48 ? 48 : tokens / 48 * 48;
}

// Row blocks from `row` on, R at a time while there are so many; returns the row that follows. The last block may be short.
template <class S, Format F, Scales K, int R, int T>
GANGLINE_INLINE int multiply_rows(const Matrix& w, const TileLayout& tile, int row, int row_end, const Activations& x,
                                  int begin, int end, float* y, std::ptrdiff_t y_stride) {
    for (; row + (R - 1) * tile_rows < row_end; row += R * tile_rows) {
        const std::uint8_t* block = w.data + static_cast<std::size_t>(row / tile_rows) * tile.block_bytes;
        const int left = row_end - row - (R - 1) * tile_rows;
        Ahead ahead;
        if (R > 1 && left > tile_rows) {
            ahead.next = block + R * static_cast<std::ptrdiff_t>(tile.block_bytes);
            ahead.end = ahead.next + R * static_cast<std::ptrdiff_t>(tile.block_bytes);
            ahead.step = (ahead.end - ahead.next) * T / (end - begin) + 64;
        }
        multiply_tokens<S, F, K, R, T>(w, tile, block, x, begin, end, y + row, y_stride, left < tile_rows ? left : tile_rows, ahead);
    }
    return row;
}

// Up to here the weights' way from memory takes longer than the arithmetic.
constexpr int few_tokens = 4;

template <class S, Format F, Scales K>
GANGLINE_INLINE void matmul_tiles_with(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const TileLayout tile = TileLayout::of(w);
    const int batch = tokens_in_cache(x.padded);
    for (int begin = 0; begin < x.tokens; begin += batch) {
        const int end = x.tokens - begin < batch ? x.tokens : begin + batch;
        int row = row_begin;
        // So few tokens wait for memory: one row block after another is one stream of bytes, which the processor fetches
        // ahead by itself.
        if (end - begin > few_tokens) {
            row = multiply_rows<S, F, K, S::row_blocks, S::tokens>(w, tile, row, row_end, x, begin, end, y, y_stride);
        }
        multiply_rows<S, F, K, 1, S::tokens>(w, tile, row, row_end, x, begin, end, y, y_stride);
    }
}

template <class S, Format F>
void matmul_tiles(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    if constexpr (gathers_groups<S, F>()) {
        if (w.byte_scales && w.group == step_columns && !w.has_zeros) {
            return matmul_tiles_with<S, F, Scales::gathered>(w, row_begin, row_end, x, y, y_stride);
        }
    }
    if constexpr (F != Format::tile_mxfp4) {
        if (w.byte_scales) return matmul_tiles_with<S, F, Scales::bytes>(w, row_begin, row_end, x, y, y_stride);
    }
    matmul_tiles_with<S, F, Scales::halves>(w, row_begin, row_end, x, y, y_stride);
}

}  // namespace
}  // namespace gangline
