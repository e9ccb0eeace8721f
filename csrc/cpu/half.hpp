// fp16 and bf16 as bits, in portable code: for the ends of rows, and for machines without conversions. Internal linkage, so
// that no copy compiled for a wide instruction set is ever the one that others call.
#pragma once

#include <cstdint>
#include <cstring>

namespace gangline {
namespace {

[[maybe_unused]] inline float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

[[maybe_unused]] inline std::uint32_t bits_of_float(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

[[maybe_unused]] inline float bf16_to_float(std::uint16_t bits) { return float_of_bits(std::uint32_t{bits} << 16); }

// Rounds to nearest even; keeps NaN quiet.
[[maybe_unused]] inline std::uint16_t float_to_bf16(float value) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

[[maybe_unused]] inline float f16_to_float(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t rest = bits & 0x7fffu;
    // Exponent and mantissa as those of a float that is 2^112 too small; the product is exact, subnormals included.
    const std::uint32_t scaled = bits_of_float(float_of_bits(rest << 13) * 0x1p112f);
    return float_of_bits(sign | (rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : scaled));
}

// Rounds to nearest even; beyond the largest half: infinity.
[[maybe_unused]] inline std::uint16_t float_to_f16(float value) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t rest = bits & 0x7fffffffu;
    std::uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // 65520 and more
        half = 0x7c00u;
    } else if (rest < 0x38800000u) {  // subnormal: the addition of 0.5 rounds to multiples of 2^-24
        half = bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
    }
    return static_cast<std::uint16_t>(sign | half);
}

}  // namespace
}  // namespace gangline
