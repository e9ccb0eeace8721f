// What the files of the decoder share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "decoder.hpp"
#include "kernels.hpp"

namespace gangline {
namespace {

inline std::size_t size(std::ptrdiff_t count) { return static_cast<std::size_t>(count); }

inline int qkv_width(const AttentionSpec& a) { return a.q.matrix.rows + a.k.matrix.rows + a.v.matrix.rows; }

// Numbers of fp32 in the model's format.
inline void write_numbers(const float* x, int n, Format format, void* y) {
    if (format == Format::f32) {
        std::copy_n(x, n, static_cast<float*>(y));
    } else if (format == Format::bf16) {
        kernels().rows.narrow_bf16(x, static_cast<std::uint16_t*>(y), n);
    } else {
        kernels().rows.narrow_f16(x, static_cast<std::uint16_t*>(y), n);
    }
}

}  // namespace
}  // namespace gangline
