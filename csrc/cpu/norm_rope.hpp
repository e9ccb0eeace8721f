// Small pieces of a transformer layer on rows of fp32: RMS norm and rotary position embedding.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.hpp"
#include "norm.hpp"

namespace gangline {
namespace {

// Numbers [begin, begin + n) of a plain row as fp32.
inline void read_numbers(const void* source, Format format, std::ptrdiff_t begin, int n, float* y) {
    if (format == Format::f32) {
        const float* x = static_cast<const float*>(source) + begin;
        for (int i = 0; i < n; ++i) y[i] = x[i];
        return;
    }
    const std::uint16_t* x = static_cast<const std::uint16_t*>(source) + begin;
    if (format == Format::bf16) {
        for (int i = 0; i < n; ++i) y[i] = bf16_to_float(x[i]);
    } else {
        for (int i = 0; i < n; ++i) y[i] = f16_to_float(x[i]);
    }
}

// 1 / sqrt(mean(x^2) + eps); sixteen partial sums, so that the order is the same wherever it is compiled.
inline float inverse_rms(const float* x, int n, float eps) {
    float lane[16] = {};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; ++l) lane[l] += x[i + l] * x[i + l];
    for (; i < n; ++i) lane[i % 16] += x[i] * x[i];
    float sum = 0.0f;
    for (float part : lane) sum += part;
    return 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
}

// y[i] = weight[begin + i] * x[i] * inverse
inline void scale_by_norm(const Norm& norm, const float* x, float inverse, int begin, int n, float* y) {
    if (norm.format == Format::f32) {
        const float* w = static_cast<const float*>(norm.weight) + begin;
        for (int i = 0; i < n; ++i) y[i] = w[i] * (x[i] * inverse);
    } else if (norm.format == Format::bf16) {
        const std::uint16_t* w = static_cast<const std::uint16_t*>(norm.weight) + begin;
        for (int i = 0; i < n; ++i) y[i] = bf16_to_float(w[i]) * (x[i] * inverse);
    } else {
        const std::uint16_t* w = static_cast<const std::uint16_t*>(norm.weight) + begin;
        for (int i = 0; i < n; ++i) y[i] = f16_to_float(w[i]) * (x[i] * inverse);
    }
}

// Rotates the first `2 * half` numbers of a head by the angles of a position (the second half is the imaginary part).
inline void rotate(float* head, const float* cosine, const float* sine, int half) {
    for (int i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

inline void clip(float* x, int n, float limit) {
    for (int i = 0; i < n; ++i) x[i] = x[i] > limit ? limit : (x[i] < -limit ? -limit : x[i]);
}

}  // namespace
}  // namespace gangline
