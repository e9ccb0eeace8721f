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

inline std::uint16_t half_bits_at(const std::uint8_t* p) {
    std::uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

}  // namespace
}  // namespace gangline
