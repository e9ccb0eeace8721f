// AVX-512: one vector for the 16 rows. With VNNI, vpdpbusd adds four products of unsigned and signed bytes to 32 bits;
// without it, as in tile_avx2.hpp.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "settle.hpp"
#include "tile_layout.hpp"

namespace gangline {
namespace {

struct Avx512Base {
    static constexpr int vectors = 1;
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;

    static Bytes load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
    static Bytes splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
    static Bytes bit_and(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
    static Bytes bit_or(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    // By N bits; to the left where N is negative. Bits that cross into a neighbouring byte are masked away by the caller.
    template <int N>
    static Bytes shift_right(Bytes a) {
        if constexpr (N == 0) return a;
        else if constexpr (N < 0) return _mm512_slli_epi16(a, -N);
        else return _mm512_srli_epi16(a, N);
    }
    static Bytes doubled_e2m1(Bytes codes) {
        const __m128i values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), codes);
    }
    static Bytes broadcast4(const std::int8_t* x) {
        std::int32_t four;
        __builtin_memcpy(&four, x, sizeof(four));
        return _mm512_set1_epi32(four);
    }

    static Ints ints(std::int32_t a) { return _mm512_set1_epi32(a); }
    static Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
    static Ints load_zeros(const std::uint8_t* p, int shift) {
        const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_sub_epi32(zeros, ints(shift));
    }
    static Floats zero_floats() { return _mm512_setzero_ps(); }
    static Floats floats(float a) { return _mm512_set1_ps(a); }
    static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* y, Floats a) { _mm512_storeu_ps(y, a); }

    static Floats load_byte_scales(const std::uint8_t* scales, int at) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + at))));
    }
    static Floats load_floats(const std::uint8_t* p, int at) { return _mm512_loadu_ps(reinterpret_cast<const float*>(p) + at); }

    template <Format F>
    static Floats load_scales(const std::uint8_t* scales, int at) {
        if constexpr (F == Format::tile_mxfp4) {
            const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + at)));
            const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, ints(1)), 23);
            const __mmask16 small = _mm512_cmplt_epi32_mask(e, ints(2));
            const __m512i finite = _mm512_mask_sllv_epi32(normal, small, ints(0x00200000), e);
            const __mmask16 nan = _mm512_cmpeq_epi32_mask(e, ints(255));
            return _mm512_castsi512_ps(_mm512_mask_mov_epi32(finite, nan, ints(0x7FC00000)));
        } else {
            return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 2 * at)));
        }
    }

    // Magnitudes compared as integers keep their order, and nan, being the largest, is not lost.
    static float largest_magnitude(const float* x, int count) {
        __m512i most = _mm512_setzero_si512();
        for (int c = 0; c < count; c += 16) {
            most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + c), ints(0x7FFFFFFF)));
        }
        return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(most)))));
    }
    static std::int32_t round_to_bytes(const float* x, int count, float inverse, std::int8_t* q) {
        __m512i sums = _mm512_setzero_si512();
        for (int c = 0; c < count; c += 16) {
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c), floats(inverse)));
            sums = _mm512_add_epi32(sums, rounded);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), _mm512_cvtsepi32_epi8(rounded));
        }
        return _mm512_reduce_add_epi32(sums);
    }
};

struct Avx512 : Avx512Base {
    static constexpr int row_blocks = 2;
    static constexpr int tokens = 4;
    static constexpr bool signed_bytes = true;
    static constexpr bool gathers = true;
    using Partial = __m512i;

    struct Plain {
        __m512i codes;
    };
    struct Signed {
        __m512i magnitude;
        __mmask64 negative;
    };
    template <Format F>
    using Weights = std::conditional_t<F == Format::tile_int8, Signed, Plain>;

    template <Format F>
    static Weights<F> prepare(Bytes codes) {
        if constexpr (F == Format::tile_int8) {
            const __m512i value = _mm512_xor_si512(codes, splat(0x80));
            return {_mm512_abs_epi8(value), _mm512_movepi8_mask(value)};
        } else {
            return {codes};
        }
    }
    static __m512i products(const Plain& w, Bytes x) { return _mm512_maddubs_epi16(w.codes, x); }
    static __m512i products(const Signed& w, Bytes x) {
        return _mm512_maddubs_epi16(w.magnitude, _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x));
    }
    template <bool First, bool Last, class W>
    static void add_products(Ints& dot, Partial& partial, const W& w, Bytes x) {
        partial = First ? products(w, x) : _mm512_add_epi16(partial, products(w, x));
        settle(partial);
        if (Last) dot = _mm512_add_epi32(dot, _mm512_madd_epi16(partial, _mm512_set1_epi16(1)));
    }
    // -(sum << Shift) in all pairs.
    template <int Shift>
    static Partial minus_shifted(std::int32_t sum) {
        const __m512i sums = _mm512_set1_epi16(static_cast<short>(sum));
        return _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_slli_epi16(sums, Shift));
    }
    static void gather(Partial& partial, const Plain& w, Bytes x) {
        partial = _mm512_add_epi16(partial, products(w, x));
        settle(partial);
    }
    static __m512i load_pair_scales(const std::uint8_t* scales, int at) {
        const __m512i rows = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + at)));
        return _mm512_mask_mov_epi16(rows, 0xAAAAAAAA, _mm512_slli_epi32(rows, 16));
    }
    static Ints widen(Partial partial, __m512i pair_scales) { return _mm512_madd_epi16(partial, pair_scales); }
};

#if defined(__AVX512VNNI__)
struct Avx512Vnni : Avx512Base {
    static constexpr int row_blocks = 2;
    static constexpr int tokens = 6;
    static constexpr bool signed_bytes = false;
    static constexpr bool gathers = false;
    struct Partial {};

    template <Format>
    using Weights = __m512i;
    template <Format>
    static __m512i prepare(Bytes codes) {
        return codes;
    }
    template <bool, bool>
    static void add_products(Ints& dot, Partial&, Bytes w, Bytes x) {
        dot = _mm512_dpbusd_epi32(dot, w, x);
    }
};
#endif

}  // namespace
}  // namespace gangline
