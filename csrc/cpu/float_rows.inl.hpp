// y = x W^T for rows of plain numbers (fp32, fp16, bf16), fp32 accumulation: two running vectors a row and token, which take
// turns along the columns, whatever the number of rows and tokens. Rows need no alignment.
#pragma once

#include <algorithm>

#include "float_panels.inl.hpp"
#include "matrix.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

struct F32Weights {
    static constexpr int size = 4;
    static Vec load(const std::uint8_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};
struct F16Weights {
    static constexpr int size = 2;
    static Vec load(const std::uint8_t* p) { return Vec::load_f16(p); }
};
struct Bf16Weights {
    static constexpr int size = 2;
    static Vec load(const std::uint8_t* p) { return Vec::load_bf16(p); }
};

inline void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

template <class Weights, int R, int T>
inline void float_rows(const std::uint8_t* w, int cols, const float* x, std::ptrdiff_t stride, float* y,
                       std::ptrdiff_t y_stride) {
    constexpr int step = chains * Vec::width;
    constexpr int ahead = 2048;  // bytes: far enough to hide memory, near enough to stay in the first cache
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{cols} * Weights::size;
    Vec acc[chains][R][T];
    for (int k = 0; k < chains; ++k)
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) acc[k][r][t] = Vec::zero();
    int c = 0;
    for (; c + step <= cols; c += step) {
        const std::uint8_t* at = w + std::ptrdiff_t{c} * Weights::size;
        if (T == 1) {
            for (int r = 0; r < R; ++r) {
                for (int i = 0; i < step * Weights::size; i += 64) prefetch(at + r * row_bytes + ahead + i);
            }
        }
        for (int k = 0; k < chains; ++k) {
            Vec weight[R];
            for (int r = 0; r < R; ++r) weight[r] = Weights::load(at + r * row_bytes + k * Vec::width * Weights::size);
            for (int t = 0; t < T; ++t) {
                const Vec activation = Vec::load(x + t * stride + c + k * Vec::width);
                for (int r = 0; r < R; ++r) acc[k][r][t] = fma(weight[r], activation, acc[k][r][t]);
            }
        }
    }
    // Constant bounds: an index known only at run time would put the running vectors into memory.
    for (int k = 0; k < chains; ++k, c += Vec::width) {
        if (c >= cols) continue;
        const int count = cols - c < Vec::width ? cols - c : Vec::width;
        for (int r = 0; r < R; ++r) {
            const Vec weight = load_weights_part<Weights>(w + r * row_bytes + std::ptrdiff_t{c} * Weights::size, count);
            for (int t = 0; t < T; ++t) {
                acc[k][r][t] = fma(weight, load_part(x + t * stride + c, count), acc[k][r][t]);
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) y[t * y_stride + r] = (acc[0][r][t] + acc[1][r][t]).sum();
}

// One token streams one row after another: the processor fetches a single stream ahead twice as fast as it does two.
template <class Weights, int R, int T>
inline void float_tokens(const std::uint8_t* w, int cols, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{cols} * Weights::size;
    int t = 0;
    for (; t + T <= x.tokens; t += T) {
        float_rows<Weights, R, T>(w, cols, x.x + t * x.stride, x.stride, y + t * y_stride, y_stride);
    }
    for (; t < x.tokens; ++t) {
        for (int r = 0; r < R; ++r) {
            float_rows<Weights, 1, 1>(w + r * row_bytes, cols, x.x + t * x.stride, x.stride, y + t * y_stride + r,
                                      y_stride);
        }
    }
}

constexpr int float_panels_from = 3;  // tokens

template <class Weights>
void float_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    // As many rows at once as leave the running vectors in registers.
    constexpr int many = Vec::width == 16 ? 4 : 2;
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{w.cols} * Weights::size;
    int r = row_begin;
    for (; x.tokens >= float_panels_from && r + float_panel_rows <= row_end; r += float_panel_rows) {
        for (int t = 0; t < x.tokens; t += float_panel_tokens) {
            panel_of_rows<Weights>(w.data + r * row_bytes, w.cols, x.x + t * x.stride, x.stride,
                                   std::min(float_panel_tokens, x.tokens - t), y + t * y_stride + r, y_stride);
        }
    }
    for (; r + many <= row_end; r += many) {
        float_tokens<Weights, many, 2>(w.data + r * row_bytes, w.cols, x, y + r, y_stride);
    }
    for (; r < row_end; ++r) float_tokens<Weights, 1, 2>(w.data + r * row_bytes, w.cols, x, y + r, y_stride);
}

}  // namespace
}  // namespace gangline
