// AVX2: two vectors for the 16 lanes of a sparse tile. An instruction multiplies unsigned by signed bytes and adds pairs in 16
// bits, which must not overflow. int8: magnitudes of the codes times activations with the sign of the codes. int4: activations
// larger by 128, hence unsigned, times the codes; 128 times the sum of the codes, which all tokens share, is taken away at the
// end of a group of activations. Until then sums are right modulo 2^16, and no true one is larger than 16 * 8 * 127.
#pragma once

#include <immintrin.h>

#include "dot_avx.hpp"
#include "settle.hpp"
#include "sparse_layout.hpp"

namespace gangline {
namespace {

struct SparseAvx2 {
    static constexpr int vectors = 2;
    static constexpr int sparse_streams = 1;
    static constexpr int sparse_tokens = 2;
    static constexpr int prefetch_ahead = 8192;
    using Floats = __m256;
    using Bytes = __m256i;
    using Dot = __m256i;
    using CodeSums = __m256i;

    static __m256i load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    template <int N>
    static __m256i shift_words(__m256i words) {
        if constexpr (N == 0) return words;
        else return _mm256_srli_epi32(words, N);
    }

    struct Pair {
        __m256 first, second;
    };
    template <Format F>
    static Pair numbers(const std::uint8_t* p) {
        const __m256i words = load(p);
        if constexpr (F == Format::sparse_bf16) {
            return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000U))))};
        } else {
            // In every 128 bits the first halves before the second ones, then these halves beside each other.
            const __m256i order = _mm256_broadcastsi128_si256(
                _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
            const __m256i parted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, order), 0xD8);
            return {_mm256_cvtph_ps(_mm256_castsi256_si128(parted)), _mm256_cvtph_ps(_mm256_extracti128_si256(parted, 1))};
        }
    }
    static __m256 broadcast_floats(const float* x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)); }
    static __m256 pick(__m256 four, __m256i positions) { return _mm256_permutevar_ps(four, positions); }

    // Of each byte the two bits from N on, as a position among 16 bytes of which byte c of a word reads 4c to 4c + 3.
    // Two bits of the next plane but one stay above them, where the shuffle does not look; these two planes share the "and".
    template <int N>
    static __m256i byte_places(__m256i words) {
        const __m256i both = _mm256_and_si256(shift_words<N % 4>(words), _mm256_set1_epi32(0x33333333));
        return _mm256_or_si256(shift_words<N / 4 * 4>(both), _mm256_set1_epi32(0x0C080400));
    }
    template <Format F>
    static __m256i broadcast_bytes(const std::int8_t* q) {
        const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
        return F == Format::sparse_int4 ? _mm256_xor_si256(sixteen, _mm256_set1_epi8(-128)) : sixteen;
    }
    static __m256i pick_bytes(__m256i sixteen, __m256i places) { return _mm256_shuffle_epi8(sixteen, places); }
    template <Format F, int P>
    static __m256i codes(const std::uint8_t* values) {
        if constexpr (F == Format::sparse_int8) {
            return _mm256_xor_si256(load(values + P * 64), _mm256_set1_epi8(-128));
        } else {
            const __m256i pair = load(values + P / 2 * 64);
            const __m256i code = _mm256_and_si256(P % 2 == 0 ? pair : _mm256_srli_epi16(pair, 4), _mm256_set1_epi8(15));
            return _mm256_sub_epi8(code, _mm256_set1_epi8(8));
        }
    }

    static Dot no_products() { return _mm256_setzero_si256(); }
    static CodeSums no_codes() { return _mm256_setzero_si256(); }
    // At most 8 planes of a group of activations: bytes hold the sums.
    template <Format F>
    static void sum_codes(CodeSums& sums, __m256i codes) {
        if constexpr (F == Format::sparse_int4) sums = _mm256_add_epi8(sums, codes);
    }
    template <Format F>
    static void add_products(Dot& dot, __m256i codes, __m256i x) {
        if constexpr (F == Format::sparse_int4) {
            dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(x, codes));
            settle(dot);
        } else {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            settle(dot);
        }
    }
    template <Format F>
    static __m256 to_floats(const Dot& dot, const CodeSums& sums) {
        if constexpr (F == Format::sparse_int4) {
            const __m256i excess = _mm256_slli_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), sums), 7);
            return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_sub_epi16(dot, excess), _mm256_set1_epi16(1)));
        } else {
            return _mm256_cvtepi32_ps(dot);
        }
    }

    static __m256 load_halves(const std::uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static __m256 where(const std::uint8_t* shifts, int a) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(shifts)));
        return _mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_set1_epi32(a)));
    }
    static __m256 add_where(__m256 acc, __m256 here, __m256 sum) { return _mm256_add_ps(acc, _mm256_and_ps(here, sum)); }
    static __m256 fused_where(__m256 here, __m256 a, __m256 b, __m256 c) {
        return _mm256_blendv_ps(c, _mm256_fmadd_ps(a, b, c), here);
    }
    static __m256 zero_floats() { return _mm256_setzero_ps(); }
    static __m256 floats(float a) { return _mm256_set1_ps(a); }
    static __m256 plus(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
    static __m256 times(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
    static __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* y, __m256 a) { _mm256_storeu_ps(y, a); }
};

#if defined(__AVXVNNI__)
struct SparseAvxVnni : SparseAvx2 {
    template <Format F>
    static void add_products(Dot& dot, __m256i codes, __m256i x) {
        if constexpr (F == Format::sparse_int4) dot = dot_four(dot, x, codes);
        else dot = dot_four(dot, _mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    }
    template <Format F>
    static __m256 to_floats(const Dot& dot, const CodeSums& sums) {
        if constexpr (F == Format::sparse_int4) {
            const __m256i excess = _mm256_slli_epi32(dot_four(no_products(), _mm256_set1_epi8(1), sums), 7);
            return _mm256_cvtepi32_ps(_mm256_sub_epi32(dot, excess));
        } else {
            return _mm256_cvtepi32_ps(dot);
        }
    }
};
#endif

}  // namespace
}  // namespace gangline
