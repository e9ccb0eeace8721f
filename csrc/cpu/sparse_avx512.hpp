// AVX-512: one vector for the 16 lanes of a sparse tile.
#pragma once

#include <immintrin.h>

#include "settle.hpp"
#include "sparse_layout.hpp"

namespace gangline {
namespace {

struct SparseAvx512Base {
    static constexpr int vectors = 1;
    // Of 32 rows each in the pattern 1:2: what one task of experts or of a linear layer has, or half of it.
    static constexpr int sparse_streams = 3;
    static constexpr int sparse_tokens = 4;
    static constexpr int prefetch_ahead = 4096;
    using Bytes = __m512i;
    using Floats = __m512;
    struct CodeSums {};

    static __m512i load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int N>
    static __m512i shift_words(__m512i words) {
        if constexpr (N == 0) return words;
        else return _mm512_srli_epi32(words, N);
    }

    struct Pair {
        __m512 first, second;
    };
    template <Format F>
    static Pair numbers(const std::uint8_t* p) {
        const __m512i words = load(p);
        if constexpr (F == Format::sparse_bf16) {
            return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
                    _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000U))))};
        } else {
            return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)),
                    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)))};
        }
    }
    static __m512 broadcast_floats(const float* x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
    static __m512 pick(__m512 four, __m512i positions) { return _mm512_permutevar_ps(four, positions); }

    // Of each byte the two bits from N on, as a position among 16 bytes of which byte c of a word reads 4c to 4c + 3.
    template <int N>
    static __m512i byte_places(__m512i words) {
        constexpr int keep_and_add = 0xEA;  // (a & b) | c
        return _mm512_ternarylogic_epi32(shift_words<N>(words), _mm512_set1_epi32(0x03030303),
                                         _mm512_set1_epi32(0x0C080400), keep_and_add);
    }
    template <Format>
    static __m512i broadcast_bytes(const std::int8_t* q) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    }
    static __m512i pick_bytes(__m512i sixteen, __m512i places) { return _mm512_shuffle_epi8(sixteen, places); }
    template <Format F, int P>
    static __m512i codes(const std::uint8_t* values) {
        if constexpr (F == Format::sparse_int8) {
            return load(values + P * 64);
        } else {
            const __m512i pair = load(values + P / 2 * 64);
            return _mm512_and_si512(P % 2 == 0 ? pair : _mm512_srli_epi16(pair, 4), _mm512_set1_epi8(15));
        }
    }
    template <Format F>
    static __m512i code_zeros() {
        return _mm512_set1_epi8(static_cast<char>(F == Format::sparse_int8 ? 128 : 8));
    }

    static CodeSums no_codes() { return {}; }
    template <Format>
    static void sum_codes(CodeSums&, __m512i) {}

    static __m512 load_halves(const std::uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static __mmask16 where(const std::uint8_t* shifts, int a) {
        return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(shifts)),
                                   _mm_set1_epi8(static_cast<char>(a)));
    }
    static __m512 add_where(__m512 acc, __mmask16 here, __m512 sum) { return _mm512_mask_add_ps(acc, here, acc, sum); }
    static __m512 fused_where(__mmask16 here, __m512 a, __m512 b, __m512 c) { return _mm512_mask3_fmadd_ps(a, b, c, here); }
    static __m512 zero_floats() { return _mm512_setzero_ps(); }
    static __m512 floats(float a) { return _mm512_set1_ps(a); }
    static __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
    static __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* y, __m512 a) { _mm512_storeu_ps(y, a); }
};

// Without VNNI: magnitudes of the codes times activations with the sign of the codes, which no pair overflows 16 bits with.
struct SparseAvx512 : SparseAvx512Base {
    using Dot = __m512i;

    static Dot no_products() { return _mm512_setzero_si512(); }
    template <Format F>
    static void add_products(Dot& dot, __m512i codes, __m512i x) {
        const __m512i value = _mm512_sub_epi8(codes, code_zeros<F>());
        const __m512i with_sign = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(value), _mm512_setzero_si512(), x);
        const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(value), with_sign);
        dot = _mm512_add_epi32(dot, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
        settle(dot);
    }
    template <Format>
    static __m512 to_floats(const Dot& dot, const CodeSums&) { return _mm512_cvtepi32_ps(dot); }
};

#if defined(__AVX512VNNI__)
// The codes are multiplied as they are; what they are too large by, times the same activations, is taken away at the end.
struct SparseAvx512Vnni : SparseAvx512Base {
    struct Dot {
        __m512i products, excess;
    };

    static Dot no_products() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    template <Format F>
    static void add_products(Dot& dot, __m512i codes, __m512i x) {
        dot.products = _mm512_dpbusd_epi32(dot.products, codes, x);
        dot.excess = _mm512_dpbusd_epi32(dot.excess, code_zeros<F>(), x);
    }
    template <Format>
    static __m512 to_floats(const Dot& dot, const CodeSums&) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(dot.products, dot.excess)); }
};
#endif

}  // namespace
}  // namespace gangline
