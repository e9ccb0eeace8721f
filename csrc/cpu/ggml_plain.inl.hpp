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

struct Q4_K {
    static constexpr int bytes = q4_k_bytes;
    static float product(const std::uint8_t* block, const std::int8_t* q, const float* scale, const std::int32_t* sum) {
        const SixBits six = six_bits(block + 4);
        const float d = f16_to_float(half_bits_at(block)), d_min = f16_to_float(half_bits_at(block + 2));
        float total = 0.0f;
        for (int g = 0; g < q4_k_groups; ++g) {
            const std::uint8_t* codes = block + q4_k_codes + g / 2 * ggml_block;
            const int shift = 4 * (g % 2);
            std::int32_t dot = 0;
            for (int i = 0; i < ggml_block; ++i) dot += (codes[i] >> shift & 15) * q[g * ggml_block + i];
            const float step = d * static_cast<float>(six.scales >> 8 * g & 63);
            const float low = d_min * static_cast<float>(six.mins >> 8 * g & 63);
            total += (step * static_cast<float>(dot) - low * static_cast<float>(sum[g])) * scale[g];
        }
        return total;
    }
};

template <class Format, int R>
inline void ggml_rows(const std::uint8_t* w, std::ptrdiff_t row_bytes, int blocks, const Activations& x, float* y,
                      std::ptrdiff_t y_stride) {
    const int groups = x.padded / ggml_block / blocks;  // of a block
    for (int t = 0; t < x.tokens; ++t) {
        for (int r = 0; r < R; ++r) {
            float total = 0.0f;
            for (int b = 0; b < blocks; ++b) {
                const std::ptrdiff_t at = (std::ptrdiff_t{t} * blocks + b) * groups;
                total += Format::product(w + r * row_bytes + std::ptrdiff_t{b} * Format::bytes, x.q + at * ggml_block,
                                         x.scale + at, x.sum + at);
            }
            y[t * y_stride + r] = total;
        }
    }
}

}  // namespace
}  // namespace gangline
