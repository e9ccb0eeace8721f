// Advanced SIMD with dot products: four vectors for the 16 rows. sdot multiplies signed bytes, which all codes fit but those
// of 8 bits; they are moved down by 128.
#pragma once

#include <arm_neon.h>

#include "tile_layout.hpp"

namespace gangline {
namespace {

struct Neon {
    static constexpr int vectors = 4;
    static constexpr int row_blocks = 1;
    static constexpr int tokens = 4;
    static constexpr bool signed_bytes = true;
    static constexpr bool gathers = false;
    using Bytes = uint8x16_t;
    using Ints = int32x4_t;
    using Floats = float32x4_t;
    struct Partial {};

    static Bytes load(const std::uint8_t* p) { return vld1q_u8(p); }
    static Bytes splat(int byte) { return vdupq_n_u8(static_cast<std::uint8_t>(byte)); }
    static Bytes bit_and(Bytes a, Bytes b) { return vandq_u8(a, b); }
    static Bytes bit_or(Bytes a, Bytes b) { return vorrq_u8(a, b); }
    // By N bits; to the left where N is negative.
    template <int N>
    static Bytes shift_right(Bytes a) {
        if constexpr (N == 0) return a;
        else if constexpr (N < 0) return vshlq_n_u8(a, -N);
        else return vshrq_n_u8(a, N);
    }
    static Bytes doubled_e2m1(Bytes codes) {
        static constexpr std::uint8_t values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        return vqtbl1q_u8(vld1q_u8(values), codes);
    }

    template <Format>
    using Weights = int8x16_t;
    template <Format F>
    static int8x16_t prepare(Bytes codes) {
        return vreinterpretq_s8_u8(F == Format::tile_int8 ? veorq_u8(codes, splat(0x80)) : codes);
    }
    static int8x16_t broadcast4(const std::int8_t* x) {
        std::int32_t four;
        __builtin_memcpy(&four, x, sizeof(four));
        return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
    template <bool, bool>
    static void add_products(Ints& dot, Partial&, int8x16_t w, int8x16_t x) {
        dot = vdotq_s32(dot, w, x);
    }

    static Ints ints(std::int32_t a) { return vdupq_n_s32(a); }
    static Ints multiply(Ints a, Ints b) { return vmulq_s32(a, b); }
    static uint32x4_t load_bytes(const std::uint8_t* p) {
        std::uint32_t four;
        __builtin_memcpy(&four, p, sizeof(four));
        return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
    }
    static Ints load_zeros(const std::uint8_t* p, int shift) {
        return vsubq_s32(vreinterpretq_s32_u32(load_bytes(p)), ints(shift));
    }
    static Floats zero_floats() { return vdupq_n_f32(0.0F); }
    static Floats floats(float a) { return vdupq_n_f32(a); }
    static Floats to_floats(Ints a) { return vcvtq_f32_s32(a); }
    static Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static void store(float* y, Floats a) { vst1q_f32(y, a); }

    static Floats load_byte_scales(const std::uint8_t* scales, int at) {
        const uint32x4_t bytes = load_bytes(scales + at);
        return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(vshlq_n_u32(bytes, 24)), 24));
    }
    static Floats load_floats(const std::uint8_t* p, int at) { return vld1q_f32(reinterpret_cast<const float*>(p) + at); }

    template <Format F>
    static Floats load_scales(const std::uint8_t* scales, int at) {
        if constexpr (F == Format::tile_mxfp4) {
            const uint32x4_t e = load_bytes(scales + at);
            const uint32x4_t normal = vshlq_n_u32(vsubq_u32(e, vdupq_n_u32(1)), 23);
            const uint32x4_t subnormal = vshlq_u32(vdupq_n_u32(0x00200000), vreinterpretq_s32_u32(e));
            const uint32x4_t bits = vbslq_u32(vcltq_u32(e, vdupq_n_u32(2)), subnormal, normal);
            const uint32x4_t nan = vceqq_u32(e, vdupq_n_u32(255));
            return vreinterpretq_f32_u32(vorrq_u32(bits, nan));
        } else {
            return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scales + 2 * at)));
        }
    }

    // Magnitudes compared as integers keep their order, and nan, being the largest, is not lost.
    static float largest_magnitude(const float* x, int count) {
        uint32x4_t most = vdupq_n_u32(0);
        for (int c = 0; c < count; c += 4) {
            const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + c));
            most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF)));
        }
        return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(vmaxvq_u32(most))), 0);
    }
    static std::int32_t round_to_bytes(const float* x, int count, float inverse, std::int8_t* q) {
        int32x4_t sums = vdupq_n_s32(0);
        for (int c = 0; c < count; c += 16) {
            int32x4_t part[4];
            for (int i = 0; i < 4; ++i) {
                part[i] = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + c + 4 * i), vdupq_n_f32(inverse)));
                sums = vaddq_s32(sums, part[i]);
            }
            const int16x8_t low = vcombine_s16(vqmovn_s32(part[0]), vqmovn_s32(part[1]));
            const int16x8_t high = vcombine_s16(vqmovn_s32(part[2]), vqmovn_s32(part[3]));
            vst1q_s8(q + c, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        }
        return vaddvq_s32(sums);
    }
};

}  // namespace
}  // namespace gangline
