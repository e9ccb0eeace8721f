// Products of ggml blocks in plain C++.
#pragma once

#include "ggml_words.inl.hpp"

namespace gangline {
namespace {

struct Q4_0 {
    static constexpr int bytes = q4_0_bytes;
    static float product(const std::uint8_t* block, const std::int8_t* q, const float* scale, const std::int32_t* sum) {
        std::int32_t dot = -8 * *sum;
        for (int i = 0; i < 16; ++i) dot += (block[2 + i] & 15) * q[i] + (block[2 + i] >> 4) * q[16 + i];
        return static_cast<float>(dot) * (f16_to_float(half_bits_at(block)) * *scale);
    }
};

struct Q8_0 {
    static constexpr int bytes = q8_0_bytes;
    static float product(const std::uint8_t* block, const std::int8_t* q, const float* scale, const std::int32_t*) {
        std::int32_t dot = 0;
        for (int i = 0; i < ggml_block; ++i) dot += static_cast<std::int8_t>(block[2 + i]) * q[i];
        return static_cast<float>(dot) * (f16_to_float(half_bits_at(block)) * *scale);
    }
};

template <class Format, int R>
inline void ggml_rows(const std::uint8_t* w, std::ptrdiff_t row_bytes, int blocks, const Activations& x, float* y,
                      std::ptrdiff_t y_stride) {
    for (int t = 0; t < x.tokens; ++t) {
        for (int r = 0; r < R; ++r) {
            float total = 0.0f;
            for (int b = 0; b < blocks; ++b) {
                const std::ptrdiff_t at = std::ptrdiff_t{t} * blocks + b;
                total += Format::product(w + r * row_bytes + std::ptrdiff_t{b} * Format::bytes, x.q + at * ggml_block,
                                         x.scale + at, x.sum + at);
            }
            y[t * y_stride + r] = total;
        }
    }
}

}  // namespace
}  // namespace gangline
