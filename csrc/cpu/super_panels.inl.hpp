// y = x W^T for ggml super-blocks (see super_words.inl.hpp), for all vector instruction sets; `S` as in tile_rows.inl.hpp. Few
// tokens multiply with rows as they stream by. For more, a block of 256 columns of a few times 16 rows is unpacked into a
// panel, one byte a code in the order of tiles, which stays in the first-level cache while all tokens pass by.
#pragma once

#if defined(__AVX2__)
#include "super_avx2.inl.hpp"
#else
#include "super_plain.inl.hpp"
#endif
#include "tile_rows.inl.hpp"

namespace gangline {
namespace {

#if defined(__AVX512F__)
inline __m512i add_ints(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
inline void load_ints(const std::int32_t* p, __m512i& v) { v = _mm512_loadu_si512(p); }
inline void load_floats(const float* p, __m512& v) { v = _mm512_loadu_ps(p); }
// sum + a0 * b0 + a1 * b1 of the two 16-bit numbers in each lane.
inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
#elif defined(__AVX2__)
inline __m256i add_ints(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
inline void load_ints(const std::int32_t* p, __m256i& v) { v = bytes_at(p); }
inline void load_floats(const float* p, __m256& v) { v = _mm256_loadu_ps(p); }
inline __m256i add_pairs(__m256i sum, __m256i a, __m256i b) { return add_scaled(sum, a, b); }
#elif defined(__ARM_NEON)
inline int32x4_t add_ints(int32x4_t a, int32x4_t b) { return vaddq_s32(a, b); }
inline void load_ints(const std::int32_t* p, int32x4_t& v) { v = vld1q_s32(p); }
inline void load_floats(const float* p, float32x4_t& v) { v = vld1q_f32(p); }
inline int32x4_t add_pairs(int32x4_t sum, int32x4_t a, int32x4_t b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}
#endif

// 256 columns of R times 16 rows.
template <class F, int R>
struct Panel {
    static constexpr int groups = super_columns / F::group;
    static constexpr int rows = R * tile_rows;
    alignas(64) std::uint8_t codes[R][super_columns / quad_columns][quad_bytes];
    alignas(64) std::int32_t scales[R][groups][tile_rows];
    alignas(64) std::int32_t mins[R][groups / 2][tile_rows];  // two neighbouring groups, 16 bits each; formats with mins
    alignas(64) float d[rows];
    alignas(64) float negative_d_min[rows];
};

template <class F>
inline void unpack_codes(const std::uint8_t* block, SuperRow& row) {
#if defined(__AVX2__)
    unrolled<8>([&](auto index) GANGLINE_INLINE_LAMBDA {
        constexpr int run = decltype(index)::value;
        _mm256_store_si256(reinterpret_cast<__m256i*>(row.codes + 32 * run), run_codes<F, run>(block));
    });
#else
    F::unpack_codes(block, row);
#endif
}

// Words of four rows that follow each other, one for each quad, to where those rows lie in a panel.
inline void put_four_rows(const SuperRow (&rows)[4], std::uint8_t* panel) {
    constexpr int quads = super_columns / quad_columns;
#if defined(__AVX2__)
    for (int quad = 0; quad < quads; quad += 4) {
        __m128i row[4];
        for (int i = 0; i < 4; ++i) row[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(rows[i].codes + 4 * quad));
        const __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpacklo_epi32(row[2], row[3]);
        const __m128i c = _mm_unpackhi_epi32(row[0], row[1]), d = _mm_unpackhi_epi32(row[2], row[3]);
        const __m128i out[4] = {_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(c, d),
                                _mm_unpackhi_epi64(c, d)};
        for (int i = 0; i < 4; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(panel + (quad + i) * quad_bytes), out[i]);
    }
#else
    for (int quad = 0; quad < quads; ++quad) {
        for (int i = 0; i < 4; ++i) std::memcpy(panel + quad * quad_bytes + 4 * i, rows[i].codes + 4 * quad, 4);
    }
#endif
}

// Fills a panel from the blocks of `count` rows, `row_bytes` apart. Rows that are not there are zero.
template <class F, int R>
GANGLINE_APART void fill_panel(const std::uint8_t* block, std::ptrdiff_t row_bytes, int count, Panel<F, R>& panel) {
    using P = Panel<F, R>;
    for (int first = 0; first < P::rows; first += 4) {
        SuperRow four[4];
        const int r = first / tile_rows;
        for (int i = 0; i < 4; ++i) {
            SuperRow& row = four[i];
            if (first + i < count) {
                unpack_codes<F>(block + (first + i) * row_bytes, row);
                F::unpack_scales(block + (first + i) * row_bytes, row);
            } else {
                std::memset(static_cast<void*>(&row), 0, sizeof row);
            }
            const int lane = (first + i) % tile_rows;
            for (int g = 0; g < P::groups; ++g) panel.scales[r][g][lane] = row.scales[g];
            for (int g = 0; F::has_mins && g < P::groups; g += 2) {
                std::memcpy(&panel.mins[r][g / 2][lane], row.mins + g, sizeof(std::int32_t));
            }
            panel.d[first + i] = row.d;
            panel.negative_d_min[first + i] = -row.d_min;
        }
        put_four_rows(four, panel.codes[r][0] + first % tile_rows * 4);
    }
}

// Where some tokens' activations of 256 columns lie.
struct PanelTokens {
    const std::int8_t* q;
    std::ptrdiff_t q_stride;
    const float* scale;
    std::ptrdiff_t scale_stride;
    const std::int16_t* sums;
    std::ptrdiff_t sum_stride;
};

// How many products of code pairs fit in 16 bits before they must be widened.
constexpr int panel_flush(int code_bits) { return code_bits == 4 ? 8 : code_bits == 5 ? 4 : 2; }

// Adds a panel's products with T tokens to acc [T, rows]. A function of its own, as multiply_block.
template <class S, class F, int R, int T>
GANGLINE_APART void multiply_panel(const Panel<F, R>& panel, const PanelTokens& x, float* acc) {
    constexpr int V = S::vectors, lanes = tile_rows / V, quads = F::group / quad_columns;
    constexpr int groups = half_columns / F::group;
    constexpr int flush = panel_flush(F::code_bits) < quads ? panel_flush(F::code_bits) : quads;
    for (int half = 0; half < 2; ++half) {
        typename S::Ints total[T][R][V];
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) total[t][r][v] = S::ints(0);
        for (int g = half * groups; g < (half + 1) * groups; ++g) {
            typename S::Ints dot[T][R][V];
            typename S::Partial partial[T][R][V];
            for (int t = 0; t < T; ++t) {
                const auto start = S::ints(F::has_mins ? 0 : -32 * x.sums[t * x.sum_stride + g]);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) dot[t][r][v] = start;
            }
            unrolled<quads>([&](auto index) GANGLINE_INLINE_LAMBDA {
                constexpr int i = decltype(index)::value;
                typename S::template Weights<Format::tile_int4> w[R][V];
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) {
                        const std::uint8_t* codes = panel.codes[r][g * quads + i] + v * (quad_bytes / V);
                        w[r][v] = S::template prepare<Format::tile_int4>(S::load(codes));
                    }
                for (int t = 0; t < T; ++t) {
                    const auto four = S::broadcast4(x.q + t * x.q_stride + (g * quads + i) * quad_columns);
                    for (int r = 0; r < R; ++r)
                        for (int v = 0; v < V; ++v)
                            S::template add_products<i % flush == 0, i % flush == flush - 1>(dot[t][r][v], partial[t][r][v],
                                                                                            w[r][v], four);
                }
            });
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    typename S::Ints scale;
                    load_ints(panel.scales[r][g] + v * lanes, scale);
                    for (int t = 0; t < T; ++t)
                        total[t][r][v] = add_ints(total[t][r][v], S::multiply(scale, dot[t][r][v]));
                }
        }
        [[maybe_unused]] typename S::Ints low[T][R][V];
        if constexpr (F::has_mins) {
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) low[t][r][v] = S::ints(0);
            for (int pair = half * groups / 2; pair < (half + 1) * groups / 2; ++pair)
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) {
                        typename S::Ints mins;
                        load_ints(panel.mins[r][pair] + v * lanes, mins);
                        for (int t = 0; t < T; ++t) {
                            std::int32_t two;
                            std::memcpy(&two, x.sums + t * x.sum_stride + 2 * pair, sizeof two);
                            low[t][r][v] = add_pairs(low[t][r][v], mins, S::ints(two));
                        }
                    }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                const int at = r * tile_rows + v * lanes;
                typename S::Floats d;
                [[maybe_unused]] typename S::Floats d_min;
                load_floats(panel.d + at, d);
                if constexpr (F::has_mins) load_floats(panel.negative_d_min + at, d_min);
                for (int t = 0; t < T; ++t) {
                    typename S::Floats value, before;
                    if constexpr (F::has_mins) {
                        value = S::fused(d_min, S::to_floats(low[t][r][v]), S::times(d, S::to_floats(total[t][r][v])));
                    } else {
                        value = S::times(d, S::to_floats(total[t][r][v]));
                    }
                    float* out = acc + t * Panel<F, R>::rows + at;
                    load_floats(out, before);
                    S::store(out, S::fused(S::floats(x.scale[t * x.scale_stride + half]), value, before));
                }
            }
    }
}

template <class S, class F, int R, int T>
GANGLINE_INLINE void multiply_panel_tokens(const Panel<F, R>& panel, PanelTokens x, int tokens, float* acc) {
    int t = 0;
    for (; t + T <= tokens; t += T) {
        multiply_panel<S, F, R, T>(panel, x, acc + t * Panel<F, R>::rows);
        x.q += T * x.q_stride;
        x.scale += T * x.scale_stride;
        x.sums += T * x.sum_stride;
    }
    if constexpr (T > 1) {
        constexpr int fewer = T > 4 ? 4 : T > 2 ? 2 : 1;
        multiply_panel_tokens<S, F, R, fewer>(panel, x, tokens - t, acc + t * Panel<F, R>::rows);
    }
}

// So many tokens at a time share a panel; their sums stay in the first-level cache.
constexpr int panel_tokens = 120;
// Up to here unpacking a panel takes longer than it saves.
constexpr int streaming_tokens = 6;

template <class S, class F>
void multiply_by_panels(const Matrix& w, int row_begin, int row_end, const Activations& x, GroupSums sums, int begin, int tokens,
                        float* y, std::ptrdiff_t y_stride) {
    constexpr int R = S::row_blocks, rows = R * tile_rows;
    const int blocks = w.cols / super_columns;
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{blocks} * F::bytes;
    Panel<F, R> panel;
    alignas(64) float acc[panel_tokens * rows];
    for (int row = row_begin; row < row_end; row += rows) {
        const int count = row_end - row < rows ? row_end - row : rows;
        for (int i = 0; i < tokens * rows; ++i) acc[i] = 0.0f;
        for (int b = 0; b < blocks; ++b) {
            fill_panel(w.data + row * row_bytes + std::ptrdiff_t{b} * F::bytes, row_bytes, count, panel);
            const PanelTokens part{x.q + std::ptrdiff_t{begin} * x.padded + std::ptrdiff_t{b} * super_columns, x.padded,
                                   x.scale + (std::ptrdiff_t{begin} * blocks + b) * 2, std::ptrdiff_t{blocks} * 2,
                                   sums.data + b * (super_columns / F::group), sums.stride};
            multiply_panel_tokens<S, F, R, S::tokens>(panel, part, tokens, acc);
        }
        for (int t = 0; t < tokens; ++t)
            std::memcpy(y + (begin + t) * y_stride + row, acc + t * rows, sizeof(float) * static_cast<std::size_t>(count));
    }
}

template <class S, class F>
void super_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const int blocks = w.cols / super_columns;
    for (int begin = 0; begin < x.tokens; begin += panel_tokens) {
        const int tokens = x.tokens - begin < panel_tokens ? x.tokens - begin : panel_tokens;
        const GroupSums sums = group_sums<F>(x, begin, tokens, w.cols);
        if (tokens > streaming_tokens) {
            multiply_by_panels<S, F>(w, row_begin, row_end, x, sums, begin, tokens, y, y_stride);
            continue;
        }
        for (int r = row_begin; r < row_end; ++r) {
            super_row<F>(w.data + std::ptrdiff_t{r} * blocks * F::bytes, blocks, x, sums, begin, tokens,
                         y + begin * y_stride + r, y_stride);
        }
    }
}

}  // namespace
}  // namespace gangline
