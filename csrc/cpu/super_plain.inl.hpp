// Products of ggml super-blocks in plain C++.
#pragma once

#include <cmath>

#include "super_words.inl.hpp"

namespace gangline {
namespace {

template <class F>
inline float half_product(const SuperRow& row, int half, const std::int8_t* q, const std::int16_t* sums) {
    constexpr int groups = half_columns / F::group;
    std::int32_t total = 0, low = 0;
    for (int g = half * groups; g < (half + 1) * groups; ++g) {
        std::int32_t dot = 0;
        for (int i = g * F::group; i < (g + 1) * F::group; ++i) dot += row.codes[i] * q[i];
        total += row.scales[g] * dot;
        low += row.mins[g] * sums[g];
    }
    if (!F::has_mins) return row.d * static_cast<float>(total - 32 * low);
    return std::fma(-row.d_min, static_cast<float>(low), row.d * static_cast<float>(total));
}

// One row times tokens [begin, begin + tokens).
template <class F>
void super_row(const std::uint8_t* w, int blocks, const Activations& x, GroupSums sums, int begin, int tokens, float* y,
               std::ptrdiff_t y_stride) {
    for (int t = 0; t < tokens; ++t) y[t * y_stride] = 0.0f;
    for (int b = 0; b < blocks; ++b) {
        SuperRow row;
        F::unpack_codes(w + std::ptrdiff_t{b} * F::bytes, row);
        F::unpack_scales(w + std::ptrdiff_t{b} * F::bytes, row);
        for (int t = 0; t < tokens; ++t) {
            const std::ptrdiff_t at = std::ptrdiff_t{begin + t} * blocks + b;
            const std::int16_t* sum = sums.data + t * sums.stride + b * (super_columns / F::group);
            for (int half = 0; half < 2; ++half) {
                const float value = half_product<F>(row, half, x.q + at * super_columns, sum);
                y[t * y_stride] = std::fma(x.scale[2 * at + half], value, y[t * y_stride]);
            }
        }
    }
}

#if defined(GANGLINE_SCALAR)
template <class F>
void super_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const int blocks = w.cols / super_columns;
    const GroupSums sums = group_sums<F>(x, 0, x.tokens, w.cols);
    for (int r = row_begin; r < row_end; ++r) {
        super_row<F>(w.data + std::ptrdiff_t{r} * blocks * F::bytes, blocks, x, sums, 0, x.tokens, y + r, y_stride);
    }
}
#endif

}  // namespace
}  // namespace gangline
