// fp16 and E8M0 to fp32 by integer arithmetic: for code that has no instruction for it.
#pragma once

#include <bit>
#include <cstdint>

namespace gangline {

constexpr float scale_of_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
    const std::uint32_t rest = half & 0x7FFFU;
    if (rest >= 0x7C00U) return std::bit_cast<float>(sign | 0x7F800000U | (rest & 0x3FFU) << 13);
    // The exponent's bias grows by 112: exact by a multiplication, which also makes subnormal halves normal.
    const float value = std::bit_cast<float>(rest << 13) * std::bit_cast<float>(std::uint32_t{(127 + 112) << 23});
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

// 2^(e - 128) of an E8M0 exponent: the scale of doubled E2M1 values. 255 stands for nan.
constexpr float scale_of_exponent(std::uint8_t exponent) {
    const std::uint32_t e = exponent;
    // The two smallest are subnormal in fp32, hence not a plain exponent field.
    const std::uint32_t bits = e == 255 ? 0x7FC00000U : e < 2 ? 0x00200000U << e : (e - 1) << 23;
    return std::bit_cast<float>(bits);
}

}  // namespace gangline
