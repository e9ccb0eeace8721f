// How ggml blocks lie, for the kernels of ggml_rows.inl.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

constexpr int ggml_block = 32;  // activations that share a scale
constexpr int q4_0_bytes = 18;
constexpr int q8_0_bytes = 34;
constexpr int q4_k_bytes = 144;
constexpr int q4_k_groups = 8;
constexpr int q4_k_codes = 16;  // where the nibbles begin

inline std::uint16_t half_bits_at(const std::uint8_t* p) {
    std::uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

// Scales and mins of a Q4_K block, one a byte: the first four are the low 6 bits of the bytes 0-3 and 4-7; the last four have
// their low nibbles in the bytes 8-11 and their upper bits on top of the others.
struct SixBits {
    std::uint64_t scales, mins;
};
inline SixBits six_bits(const std::uint8_t* p) {
    std::uint32_t a, b, c;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + 4, 4);
    std::memcpy(&c, p + 8, 4);
    const std::uint64_t scales = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
    const std::uint64_t mins = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
    return {scales << 32 | (a & 0x3f3f3f3fu), mins << 32 | (b & 0x3f3f3f3fu)};
}

}  // namespace
}  // namespace gangline
