// AVX2: two vectors for the 16 rows. With AVX-VNNI as in tile_avx512.hpp; without it vpmaddubsw multiplies unsigned by signed
// bytes into 16-bit pairs, which would overflow with 8-bit codes: those are taken as signed numbers w, and |w| is multiplied
// by x with the sign of w.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "dot_avx.hpp"
#include "settle.hpp"
#include "tile_layout.hpp"

namespace gangline {
namespace {

struct Avx2 {
    static constexpr int vectors = 2;
    static constexpr int row_blocks = 1;
    static constexpr int tokens = 6;
    static constexpr bool signed_bytes = true;
    static constexpr bool gathers = true;
    using Bytes = __m256i;
    using Ints = __m256i;
    using Floats = __m256;
    using Partial = __m256i;

    struct Plain {
        __m256i codes;
    };
    struct Signed {
        __m256i magnitude, value;
    };
    template <Format F>
    using Weights = std::conditional_t<F == Format::tile_int8, Signed, Plain>;

    static Bytes load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Bytes splat(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
    static Bytes bit_and(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
    static Bytes bit_or(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
    // By N bits; to the left where N is negative. Bits that cross into a neighbouring byte are masked away by the caller.
    template <int N>
    static Bytes shift_right(Bytes a) {
        if constexpr (N == 0) return a;
        else if constexpr (N < 0) return _mm256_slli_epi16(a, -N);
        else return _mm256_srli_epi16(a, N);
    }
    static Bytes doubled_e2m1(Bytes codes) {
        const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
    }

    template <Format F>
    static Weights<F> prepare(Bytes codes) {
        if constexpr (F == Format::tile_int8) {
            const __m256i value = _mm256_xor_si256(codes, splat(0x80));
            return {_mm256_abs_epi8(value), value};
        } else {
            return {codes};
        }
    }
    static Bytes broadcast4(const std::int8_t* x) {
        std::int32_t four;
        __builtin_memcpy(&four, x, sizeof(four));
        return _mm256_set1_epi32(four);
    }
    static __m256i products(const Plain& w, Bytes x) { return _mm256_maddubs_epi16(w.codes, x); }
    static __m256i products(const Signed& w, Bytes x) {
        return _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
    }
    template <bool First, bool Last, class W>
    static void add_products(Ints& dot, Partial& partial, const W& w, Bytes x) {
        partial = First ? products(w, x) : _mm256_add_epi16(partial, products(w, x));
        settle(partial);
        if (Last) dot = _mm256_add_epi32(dot, _mm256_madd_epi16(partial, _mm256_set1_epi16(1)));
    }

    // -(sum << Shift) in all pairs.
    template <int Shift>
    static Partial minus_shifted(std::int32_t sum) {
        const __m256i sums = _mm256_set1_epi16(static_cast<short>(sum));
        return _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_slli_epi16(sums, Shift));
    }
    static void gather(Partial& partial, const Plain& w, Bytes x) {
        partial = _mm256_add_epi16(partial, products(w, x));
        settle(partial);
    }
    static __m256i load_pair_scales(const std::uint8_t* scales, int at) {
        const __m256i rows = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + at)));
        return _mm256_blend_epi16(rows, _mm256_slli_epi32(rows, 16), 0xAA);
    }
    static Ints widen(Partial partial, __m256i pair_scales) { return _mm256_madd_epi16(partial, pair_scales); }

    static Ints ints(std::int32_t a) { return _mm256_set1_epi32(a); }
    static Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
    static Ints load_zeros(const std::uint8_t* p, int shift) {
        const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm256_sub_epi32(zeros, ints(shift));
    }
    static Floats zero_floats() { return _mm256_setzero_ps(); }
    static Floats floats(float a) { return _mm256_set1_ps(a); }
    static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
    static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* y, Floats a) { _mm256_storeu_ps(y, a); }

    static Floats load_byte_scales(const std::uint8_t* scales, int at) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + at))));
    }
    static Floats load_floats(const std::uint8_t* p, int at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p) + at); }

    template <Format F>
    static Floats load_scales(const std::uint8_t* scales, int at) {
        if constexpr (F == Format::tile_mxfp4) {
            const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + at)));
            const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, ints(1)), 23);
            const __m256i subnormal = _mm256_sllv_epi32(ints(0x00200000), e);
            const __m256i bits = _mm256_blendv_epi8(normal, subnormal, _mm256_cmpgt_epi32(ints(2), e));
            const __m256i nan = _mm256_cmpeq_epi32(e, ints(255));
            return _mm256_castsi256_ps(_mm256_or_si256(bits, nan));
        } else {
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 2 * at)));
        }
    }

    // Magnitudes compared as integers keep their order, and nan, being the largest, is not lost.
    static float largest_magnitude(const float* x, int count) {
        __m256i most = _mm256_setzero_si256();
        for (int c = 0; c < count; c += 8) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + c));
            most = _mm256_max_epu32(most, _mm256_and_si256(bits, ints(0x7FFFFFFF)));
        }
        __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
        four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
        four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1));
        return _mm_cvtss_f32(_mm_castsi128_ps(four));
    }
    static std::int32_t round_to_bytes(const float* x, int count, float inverse, std::int8_t* q) {
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i sums = _mm256_setzero_si256();
        for (int c = 0; c < count; c += 32) {
            __m256i part[4];
            for (int i = 0; i < 4; ++i) {
                part[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + c + 8 * i), floats(inverse)));
                sums = _mm256_add_epi32(sums, part[i]);
            }
            const __m256i low = _mm256_packs_epi32(part[0], part[1]);
            const __m256i high = _mm256_packs_epi32(part[2], part[3]);
            const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + c), bytes);
        }
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
        return _mm_cvtsi128_si32(four);
    }
};

#if defined(__AVXVNNI__)
struct AvxVnni : Avx2 {
    static constexpr bool signed_bytes = false;
    static constexpr bool gathers = false;
    struct Partial {};

    template <Format>
    using Weights = __m256i;
    template <Format>
    static __m256i prepare(Bytes codes) {
        return codes;
    }
    template <bool, bool>
    static void add_products(Ints& dot, Partial&, Bytes w, Bytes x) {
        dot = dot_four(dot, w, x);
    }
};
#endif

}  // namespace
}  // namespace gangline
