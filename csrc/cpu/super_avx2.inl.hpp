// One row of ggml super-blocks times a few tokens, as it streams from memory: AVX2, and VNNI where the including file has it.
#pragma once

#include <immintrin.h>

#include "super_words.inl.hpp"
#include "tile_rows.inl.hpp"

namespace gangline {
namespace {

inline __m256i bytes_at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i low_lane(__m256i v) { return _mm256_castsi256_si128(v); }
inline __m128i high_lane(__m256i v) { return _mm256_extracti128_si256(v, 1); }
inline __m128i both_lanes(__m256i v) { return _mm_add_epi32(low_lane(v), high_lane(v)); }

// The nibbles of 32 bytes, the low or the high ones.
template <bool High>
inline __m256i nibbles_at(const std::uint8_t* p) {
    const __m256i packed = bytes_at(p);
    return _mm256_and_si256(High ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15));
}

// Bits [From, From + Count) of every byte as the bits from 4 on.
template <int From, int Count>
inline __m256i upper_bits(__m256i packed) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << Count) - 1) << 4));
    if constexpr (From < 4) return _mm256_and_si256(_mm256_slli_epi16(packed, 4 - From), mask);
    else return _mm256_and_si256(_mm256_srli_epi16(packed, From - 4), mask);
}

// The 32 codes of run `Run` (of eight) of a block.
template <class F, int Run>
inline __m256i run_codes(const std::uint8_t* block) {
    if constexpr (F::code_bits == 4) {
        return nibbles_at<Run % 2 == 1>(block + 16 + 32 * (Run / 2));
    } else if constexpr (F::code_bits == 5) {
        return _mm256_or_si256(nibbles_at<Run % 2 == 1>(block + 48 + 32 * (Run / 2)), upper_bits<Run, 1>(bytes_at(block + 16)));
    } else {
        const __m256i low = nibbles_at<Run % 4 >= 2>(block + 64 * (Run / 4) + 32 * (Run % 2));
        return _mm256_or_si256(low, upper_bits<Run % 4 * 2, 2>(bytes_at(block + 128 + 32 * (Run / 4))));
    }
}

// Scales and mins of a block as 16-bit numbers.
template <class F>
struct SuperHead {
    __m256i scales, mins;  // with mins: the eight of them in both lanes
    __m128i scale_bytes;   // without
    __m128 d, negative_d_min;

    explicit SuperHead(const std::uint8_t* block) {
        std::uint16_t bits;
        if constexpr (F::has_mins) {
            const SixBits six = six_bits(block + 4);
            scales = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(six.scales))));
            mins = _mm256_castsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(six.mins))));
            std::memcpy(&bits, block + 2, sizeof bits);
            negative_d_min = _mm_set1_ps(-_cvtsh_ss(bits));
            std::memcpy(&bits, block, sizeof bits);
        } else {
            scale_bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 192));
            mins = _mm256_cvtepi8_epi16(scale_bytes);
            std::memcpy(&bits, block + 208, sizeof bits);
        }
        d = _mm_set1_ps(_cvtsh_ss(bits));
    }

    // The scale of each of 16 pairs of codes.
    template <int Run>
    __m256i of_run() const {
        if constexpr (F::has_mins) {
            return _mm256_shuffle_epi8(scales, _mm256_set1_epi16(static_cast<short>((2 * Run + 1) << 8 | 2 * Run)));
        } else {
            const __m128i twice = _mm_unpacklo_epi64(_mm_set1_epi8(2 * Run), _mm_set1_epi8(2 * Run + 1));
            return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scale_bytes, twice));
        }
    }

    // Values of both halves in the first two lanes, from their sums and the sums of the activations.
    __m128 halves(const __m256i (&total)[2], const std::int16_t* sums) const {
        if constexpr (F::has_mins) {
            const __m128i low = _mm_madd_epi16(low_lane(mins), _mm_loadu_si128(reinterpret_cast<const __m128i*>(sums)));
            const __m128i four = _mm_hadd_epi32(_mm_hadd_epi32(both_lanes(total[0]), both_lanes(total[1])), low);
            const __m128 values = _mm_cvtepi32_ps(four);
            return _mm_fmadd_ps(negative_d_min, _mm_movehl_ps(values, values), _mm_mul_ps(d, values));
        } else {
            const __m256i low = _mm256_slli_epi32(_mm256_madd_epi16(mins, bytes_at(sums)), 5);
            const __m128i two = _mm_hadd_epi32(_mm_sub_epi32(both_lanes(total[0]), low_lane(low)),
                                               _mm_sub_epi32(both_lanes(total[1]), high_lane(low)));
            return _mm_mul_ps(d, _mm_cvtepi32_ps(_mm_hadd_epi32(two, two)));
        }
    }
};

inline __m256i add_scaled(__m256i total, __m256i products, __m256i scales) {
#if defined(GANGLINE_DOT_AVX)
    return dot_two(total, products, scales);
#else
    return _mm256_add_epi32(total, _mm256_madd_epi16(products, scales));
#endif
}

template <class F, int T>
inline void super_row_tokens(const std::uint8_t* w, int blocks, const Activations& x, GroupSums sums, int token, int first,
                             float* y, std::ptrdiff_t y_stride) {
    constexpr int ahead = 2048;  // bytes to ask for in advance
    __m128 acc[T];
    for (int t = 0; t < T; ++t) acc[t] = _mm_setzero_ps();
    for (int b = 0; b < blocks; ++b) {
        const std::uint8_t* block = w + std::ptrdiff_t{b} * F::bytes;
        for (int i = 0; i < F::bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(block + ahead + i), _MM_HINT_T0);
        const SuperHead<F> head(block);
        __m256i total[T][2];
        for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_si256();
        const std::int8_t* q = x.q + (std::ptrdiff_t{token} * blocks + b) * super_columns;
        unrolled<8>([&](auto index) GANGLINE_INLINE_LAMBDA {
            constexpr int run = decltype(index)::value;
            const __m256i codes = run_codes<F, run>(block), scales = head.template of_run<run>();
            for (int t = 0; t < T; ++t) {
                // Two products of at most 63 * 127 fit 16 bits.
                const __m256i pairs = _mm256_maddubs_epi16(codes, bytes_at(q + std::ptrdiff_t{t} * x.padded + 32 * run));
                total[t][run / 4] = add_scaled(total[t][run / 4], pairs, scales);
            }
        });
        for (int t = 0; t < T; ++t) {
            const std::int16_t* sum = sums.data + (first + t) * sums.stride + std::ptrdiff_t{b} * (super_columns / F::group);
            const __m128 values = head.halves(total[t], sum);
            const float* scale = x.scale + (std::ptrdiff_t{token + t} * blocks + b) * 2;
            acc[t] = _mm_fmadd_ss(_mm_load_ss(scale), values, acc[t]);
            acc[t] = _mm_fmadd_ss(_mm_load_ss(scale + 1), _mm_movehdup_ps(values), acc[t]);
        }
    }
    for (int t = 0; t < T; ++t) y[t * y_stride] = _mm_cvtss_f32(acc[t]);
}

template <class F>
inline void super_row(const std::uint8_t* w, int blocks, const Activations& x, GroupSums sums, int begin, int tokens, float* y,
               std::ptrdiff_t y_stride) {
    int t = 0;
    for (; t + 2 <= tokens; t += 2) super_row_tokens<F, 2>(w, blocks, x, sums, begin + t, t, y + t * y_stride, y_stride);
    for (; t < tokens; ++t) super_row_tokens<F, 1>(w, blocks, x, sums, begin + t, t, y + t * y_stride, y_stride);
}

}  // namespace
}  // namespace gangline
