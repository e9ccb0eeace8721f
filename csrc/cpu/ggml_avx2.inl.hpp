// Products of ggml blocks with AVX2, and VNNI where the including file is compiled for it.
#pragma once

#include "dot_avx.hpp"
#include "ggml_words.inl.hpp"

namespace gangline {
namespace {

// The eight partial sums of 32 products, added to `start`: unsigned bytes times signed ones.
inline __m256i dot_unsigned(__m256i start, __m256i w, __m256i q) {
#if defined(GANGLINE_DOT_AVX)
    return dot_four(start, w, q);
#else
    // Two products of at most 15 * 127 fit 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16(w, q);
    return _mm256_add_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

inline __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i two_halves(const void* first, const void* second) {
    const __m128i low = _mm_loadu_si128(static_cast<const __m128i*>(first));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(static_cast<const __m128i*>(second)), 1);
}

// Eight partial sums of 64 products with nibbles.
inline __m256i dot_nibbles(__m256i w0, __m256i q0, __m256i w1, __m256i q1) {
#if defined(GANGLINE_DOT_AVX)
    return dot_four(dot_four(_mm256_setzero_si256(), w0, q0), w1, q1);
#else
    // Four products of at most 15 * 127 fit 16 bits.
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w0, q0), _mm256_maddubs_epi16(w1, q1));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

inline __m256i in_first_lane(std::int32_t value) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(value)); }

// fp16 numbers `step` bytes apart, as floats; `count` of at most eight.
inline __m256 halves_as_floats(const std::uint8_t* p, int step, int count) {
    if (count < 8) {
        std::uint16_t bits[8] = {};
        for (int i = 0; i < count; ++i) bits[i] = half_bits_at(p + i * step);
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
    }
    __m128i bits = _mm_cvtsi32_si128(half_bits_at(p));
    bits = _mm_insert_epi16(bits, half_bits_at(p + step), 1);
    bits = _mm_insert_epi16(bits, half_bits_at(p + 2 * step), 2);
    bits = _mm_insert_epi16(bits, half_bits_at(p + 3 * step), 3);
    bits = _mm_insert_epi16(bits, half_bits_at(p + 4 * step), 4);
    bits = _mm_insert_epi16(bits, half_bits_at(p + 5 * step), 5);
    bits = _mm_insert_epi16(bits, half_bits_at(p + 6 * step), 6);
    bits = _mm_insert_epi16(bits, half_bits_at(p + 7 * step), 7);
    return _mm256_cvtph_ps(bits);
}

inline __m256 some_floats(const float* p, int count) {
    if (count >= 8) return _mm256_loadu_ps(p);
    float part[8] = {};
    std::memcpy(part, p, sizeof(float) * static_cast<std::size_t>(count));
    return _mm256_loadu_ps(part);
}

inline __m256i some_integers(const std::int32_t* p, int count) {
    if (count >= 8) return load_bytes(p);
    std::int32_t part[8] = {};
    std::memcpy(part, p, sizeof(std::int32_t) * static_cast<std::size_t>(count));
    return load_bytes(part);
}

inline float sum_lanes(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline void ask_for(const std::uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

struct Q4_0 {
    static constexpr int bytes = q4_0_bytes;
};

struct Q8_0 {
    static constexpr int bytes = q8_0_bytes;
#if defined(GANGLINE_DOT_AVX)
    static __m256i weights(const std::uint8_t* block) {
        return _mm256_xor_si256(load_bytes(block + 2), _mm256_set1_epi8(-128));
    }
    static __m256i start(std::int32_t sum) { return in_first_lane(-128 * sum); }
    static __m256i dot(__m256i start, __m256i w, __m256i q) { return dot_unsigned(start, w, q); }
#else
    static __m256i weights(const std::uint8_t* block) { return load_bytes(block + 2); }
    static __m256i start(std::int32_t) { return _mm256_setzero_si256(); }
    static __m256i dot(__m256i, __m256i w, __m256i q) {
        // |w| times q with w's sign; two products of at most 128 * 127 fit 16 bits.
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#endif
};

constexpr int ggml_ahead = 2048;  // bytes to ask for in advance, along the one stream of a single token

// R rows and T tokens of a format whose blocks have one scale. Scales are prepared for eight blocks at a time; even and odd
// blocks have running sums of their own.
template <class Format, int R, int T>
inline void small_blocks(const std::uint8_t* w, std::ptrdiff_t row_bytes, int blocks, const Activations& x, int token,
                         float* y, std::ptrdiff_t y_stride) {
    __m256 even[R][T], odd[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) even[r][t] = odd[r][t] = _mm256_setzero_ps();
    alignas(32) float scale[R][T][8];
    const auto add = [&](__m256 (&acc)[R][T], const std::uint8_t* first, int b, int i) {
        __m256i weights[R];
        for (int r = 0; r < R; ++r) weights[r] = Format::weights(first + r * row_bytes + i * Format::bytes);
        for (int t = 0; t < T; ++t) {
            const std::ptrdiff_t at = std::ptrdiff_t{token + t} * blocks + b + i;
            const __m256i values = load_bytes(x.q + at * ggml_block);
            const __m256i start = Format::start(x.sum[at]);
            for (int r = 0; r < R; ++r) {
                const __m256 dot = _mm256_cvtepi32_ps(Format::dot(start, weights[r], values));
                acc[r][t] = _mm256_fmadd_ps(dot, _mm256_broadcast_ss(&scale[r][t][i]), acc[r][t]);
            }
        }
    };
    for (int b = 0; b < blocks; b += 8) {
        const int count = blocks - b < 8 ? blocks - b : 8;
        const std::uint8_t* first = w + std::ptrdiff_t{b} * Format::bytes;
        if (T == 1) {
            for (int i = 0; i < 8 * Format::bytes; i += 64) ask_for(first + ggml_ahead + i);
        }
        for (int r = 0; r < R; ++r) {
            const __m256 d = halves_as_floats(first + r * row_bytes, Format::bytes, count);
            for (int t = 0; t < T; ++t) {
                const __m256 x_scale = some_floats(x.scale + std::ptrdiff_t{token + t} * blocks + b, count);
                _mm256_store_ps(scale[r][t], _mm256_mul_ps(d, x_scale));
            }
        }
        for (int i = 0; i < count; i += 2) {
            add(even, first, b, i);
            if (i + 1 < count) add(odd, first, b, i + 1);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            y[(token + t) * y_stride + r] = sum_lanes(_mm256_add_ps(even[r][t], odd[r][t]));
        }
}

// Q4_0: two blocks side by side in the halves of a register; their offset of 8 is taken away once for eight blocks.
template <int R, int T>
inline void nibble_blocks(const std::uint8_t* w, std::ptrdiff_t row_bytes, int blocks, const Activations& x, int token,
                          float* y, std::ptrdiff_t y_stride) {
    constexpr int bytes = q4_0_bytes;
    const __m256i twice = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    __m256 even[R][T], odd[R][T], offset[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) even[r][t] = odd[r][t] = offset[r][t] = _mm256_setzero_ps();
    __m256 scale[R][T];
    const auto add = [&](__m256 (&acc)[R][T], const std::uint8_t* first, int b, int i, int next) {
        __m256i low[R], high[R];
        for (int r = 0; r < R; ++r) {
            const std::uint8_t* block = first + r * row_bytes + 2;
            const __m256i codes = two_halves(block + i * bytes, block + next * bytes);
            low[r] = low_nibbles(codes);
            high[r] = low_nibbles(_mm256_srli_epi16(codes, 4));
        }
        const __m256i which = _mm256_add_epi32(twice, _mm256_set1_epi32(i));
        for (int t = 0; t < T; ++t) {
            const std::int8_t* q = x.q + (std::ptrdiff_t{token + t} * blocks + b) * ggml_block;
            const __m256i q_low = two_halves(q + i * ggml_block, q + next * ggml_block);
            const __m256i q_high = two_halves(q + i * ggml_block + 16, q + next * ggml_block + 16);
            for (int r = 0; r < R; ++r) {
                const __m256 dot = _mm256_cvtepi32_ps(dot_nibbles(low[r], q_low, high[r], q_high));
                acc[r][t] = _mm256_fmadd_ps(dot, _mm256_permutevar8x32_ps(scale[r][t], which), acc[r][t]);
            }
        }
    };
    for (int b = 0; b < blocks; b += 8) {
        const int count = blocks - b < 8 ? blocks - b : 8;
        const std::uint8_t* first = w + std::ptrdiff_t{b} * bytes;
        if (T == 1) {
            for (int i = 0; i < 8 * bytes; i += 64) ask_for(first + ggml_ahead + i);
        }
        for (int r = 0; r < R; ++r) {
            const __m256 d = halves_as_floats(first + r * row_bytes, bytes, count);
            for (int t = 0; t < T; ++t) {
                const std::ptrdiff_t at = std::ptrdiff_t{token + t} * blocks + b;
                scale[r][t] = _mm256_mul_ps(d, some_floats(x.scale + at, count));
                const __m256 sums = _mm256_cvtepi32_ps(some_integers(x.sum + at, count));
                offset[r][t] = _mm256_fmadd_ps(scale[r][t], sums, offset[r][t]);
            }
        }
        if (count == 8) {
            add(even, first, b, 0, 1);
            add(odd, first, b, 2, 3);
            add(even, first, b, 4, 5);
            add(odd, first, b, 6, 7);
            continue;
        }
        // The scale of a block that is not there is zero: any other may stand for it.
        for (int i = 0; i < count; i += 4) {
            add(even, first, b, i, i + 1 < count ? i + 1 : i);
            if (i + 2 < count) add(odd, first, b, i + 2, i + 3 < count ? i + 3 : i + 2);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            const __m256 sum = _mm256_add_ps(even[r][t], odd[r][t]);
            y[(token + t) * y_stride + r] = sum_lanes(_mm256_fmadd_ps(_mm256_set1_ps(-8.0f), offset[r][t], sum));
        }
}

template <class Format, int R, int T>
inline void ggml_blocks(const std::uint8_t* w, std::ptrdiff_t row_bytes, int blocks, const Activations& x, int token,
                        float* y, std::ptrdiff_t y_stride) {
    if constexpr (Format::bytes == q4_0_bytes) nibble_blocks<R, T>(w, row_bytes, blocks, x, token, y, y_stride);
    else small_blocks<Format, R, T>(w, row_bytes, blocks, x, token, y, y_stride);
}

// Several tokens share what is unpacked; one token streams one row after another, which is what memory likes best.
template <class Format, int R>
inline void ggml_rows(const std::uint8_t* w, std::ptrdiff_t row_bytes, int blocks, const Activations& x, float* y,
                      std::ptrdiff_t y_stride) {
    int t = 0;
    for (; t + 2 <= x.tokens; t += 2) ggml_blocks<Format, R, 2>(w, row_bytes, blocks, x, t, y, y_stride);
    for (; t < x.tokens; ++t) {
        for (int r = 0; r < R; ++r) ggml_blocks<Format, 1, 1>(w + r * row_bytes, row_bytes, blocks, x, t, y + r, y_stride);
    }
}

}  // namespace
}  // namespace gangline
