// Four products of unsigned and signed bytes added to each 32 bits of a 256-bit vector, by one instruction, where the
// including file is compiled for one: AVX-512's or that of AVX-VNNI, which processors without AVX-512 have.
#pragma once

#include <immintrin.h>

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define GANGLINE_DOT_AVX 1
#endif

#if defined(GANGLINE_DOT_AVX)
namespace gangline {
namespace {

inline __m256i dot_four(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

// The same of two 16-bit numbers each.
inline __m256i dot_two(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__)
    return _mm256_dpwssd_epi32(sum, a, b);
#else
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#endif
}

}  // namespace
}  // namespace gangline
#endif
