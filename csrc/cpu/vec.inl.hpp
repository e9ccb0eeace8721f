// A vector of floats in the widest registers that the including file is compiled for; GANGLINE_SCALAR forces the portable
// one. Included inside one translation unit per instruction set; everything has internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(GANGLINE_SCALAR) && (defined(__AVX2__) || defined(__AVX512F__))
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers read "undefined" registers, of which it then warns wherever they are inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#elif !defined(GANGLINE_SCALAR) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "half.hpp"

namespace gangline {
namespace {

#if !defined(GANGLINE_SCALAR) && defined(__AVX512F__)

struct Vec {
    static constexpr int width = 16;
    __m512 v;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float a) { return {_mm512_set1_ps(a)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load_bf16(const void* p) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(
            _mm256_loadu_si256(static_cast<const __m256i*>(p))), 16))};
    }
    static Vec load_f16(const void* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store_f16(std::uint16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    float sum() const { return _mm512_reduce_add_ps(v); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where one of them is NaN.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec positive_or(Vec x, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v, a.v)};
}
inline Vec rounded(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec times_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

#elif !defined(GANGLINE_SCALAR) && defined(__AVX2__)

struct Vec {
    static constexpr int width = 8;
    __m256 v;

    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec all(float a) { return {_mm256_set1_ps(a)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load_bf16(const void* p) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(
            _mm_loadu_si128(static_cast<const __m128i*>(p))), 16))};
    }
    static Vec load_f16(const void* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store_f16(std::uint16_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    float sum() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec positive_or(Vec x, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
}
inline Vec rounded(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two halves, so that results reach infinity and the subnormals.
inline Vec times_power(Vec a, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)))};
}

#elif !defined(GANGLINE_SCALAR) && defined(__ARM_NEON)

struct Vec {
    static constexpr int width = 4;
    float32x4_t v;

    static Vec zero() { return {vdupq_n_f32(0)}; }
    static Vec all(float a) { return {vdupq_n_f32(a)}; }
    static Vec load(const float* p) { return {vld1q_f32(p)}; }
    static Vec load_bf16(const void* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(static_cast<const std::uint8_t*>(p))), 16))};
    }
    static Vec load_f16(const void* p) {
        return {vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(static_cast<const std::uint8_t*>(p))))};
    }
    void store(float* p) const { vst1q_f32(p, v); }
    void store_f16(std::uint16_t* p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
    float sum() const { return vaddvq_f32(v); }
};
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec positive_or(Vec x, Vec a, Vec b) { return {vbslq_f32(vcgtzq_f32(x.v), a.v, b.v)}; }
inline Vec rounded(Vec a) { return {vrndnq_f32(a.v)}; }
inline float32x4_t power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline Vec times_power(Vec a, Vec n) {
    const int32x4_t whole = vcvtnq_s32_f32(n.v);
    const int32x4_t half = vshrq_n_s32(whole, 1);
    return {vmulq_f32(vmulq_f32(a.v, power_of_two(half)), power_of_two(vsubq_s32(whole, half)))};
}

#else

// Eight lanes in portable code: compilers turn the loops into whatever vectors the platform's baseline has. Products and
// sums are rounded apart, because a fused one is a library call where the hardware has none.
struct Vec {
    static constexpr int width = 8;
    float v[8];

    template <class Function>
    static Vec each(Function function) {
        Vec out;
        for (int i = 0; i < width; ++i) out.v[i] = function(i);
        return out;
    }
    static Vec zero() { return all(0.0f); }
    static Vec all(float a) { return each([&](int) { return a; }); }
    static Vec load(const float* p) {
        Vec out;
        std::memcpy(out.v, p, sizeof out.v);
        return out;
    }
    static Vec load_bf16(const void* p) {
        std::uint16_t bits[8];
        std::memcpy(bits, p, sizeof bits);
        return each([&](int i) { return bf16_to_float(bits[i]); });
    }
    static Vec load_f16(const void* p) {
        std::uint16_t bits[8];
        std::memcpy(bits, p, sizeof bits);
        return each([&](int i) { return f16_to_float(bits[i]); });
    }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
    void store_f16(std::uint16_t* p) const {
        for (int i = 0; i < width; ++i) p[i] = float_to_f16(v[i]);
    }
    float sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
};
inline Vec operator+(Vec a, Vec b) { return Vec::each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return Vec::each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return Vec::each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return Vec::each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return Vec::each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Vec min(Vec a, Vec b) { return Vec::each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec max(Vec a, Vec b) { return Vec::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec positive_or(Vec x, Vec a, Vec b) {
    return Vec::each([&](int i) { return x.v[i] > 0.0f ? a.v[i] : b.v[i]; });
}
// Valid for |a| < 2^22, which is all that is asked of it.
inline Vec rounded(Vec a) {
    return Vec::each([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
inline float power_of_two(int n) { return float_of_bits(static_cast<std::uint32_t>(n + 127) << 23); }
inline Vec times_power(Vec a, Vec n) {
    return Vec::each([&](int i) {
        const int whole = static_cast<int>(n.v[i]);
        const int half = whole >> 1;
        return a.v[i] * power_of_two(half) * power_of_two(whole - half);
    });
}

#endif

// exp(x) within about one unit in the last place. exp(r) on |r| <= ln(2) / 2 by its series: the eighth term is below 6e-9.
// Arguments beyond the range of fp32 give 0 and infinity; NaN gives an arbitrary number.
inline Vec exponential(Vec x) {
    x = min(max(x, Vec::all(-105.0f)), Vec::all(90.0f));
    const Vec n = rounded(x * Vec::all(1.44269504f));
    Vec r = fma(n, Vec::all(-0.693359375f), x);  // exact: few bits in the constant
    r = fma(n, Vec::all(2.12194440e-4f), r);
    Vec p = Vec::all(1.0f / 5040.0f);
    p = fma(p, r, Vec::all(1.0f / 720.0f));
    p = fma(p, r, Vec::all(1.0f / 120.0f));
    p = fma(p, r, Vec::all(1.0f / 24.0f));
    p = fma(p, r, Vec::all(1.0f / 6.0f));
    p = fma(p, r, Vec::all(0.5f));
    p = fma(p, r, Vec::all(1.0f));
    p = fma(p, r, Vec::all(1.0f));
    return times_power(p, n);
}

// n values from p, fewer than a vector; the others are zero.
inline Vec load_part(const float* p, int n) {
    float buffer[Vec::width] = {};
    std::memcpy(buffer, p, sizeof(float) * static_cast<std::size_t>(n));
    return Vec::load(buffer);
}

inline void store_part(Vec v, float* p, int n) {
    float buffer[Vec::width];
    v.store(buffer);
    std::memcpy(p, buffer, sizeof(float) * static_cast<std::size_t>(n));
}

}  // namespace
}  // namespace gangline
