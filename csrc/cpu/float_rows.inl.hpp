// y = x W^T for rows of plain numbers (fp32, fp16, bf16), fp32 accumulation: one running vector a row and token, columns in
// ascending order, whatever the block of rows and tokens. Rows need no alignment.
#pragma once

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

// The last `count` columns, the rest of the vector zero.
template <class Weights>
inline Vec load_weights_part(const std::uint8_t* p, int count) {
    std::uint8_t buffer[Vec::width * Weights::size] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(count) * Weights::size);
    return Weights::load(buffer);
}

inline void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

template <class Weights, int R, int T>
inline void float_block(const std::uint8_t* w, std::ptrdiff_t row_bytes, int cols, const float* x, std::ptrdiff_t stride,
                        float* y, std::ptrdiff_t y_stride) {
    Vec acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) acc[r][t] = Vec::zero();
    int c = 0;
    for (; c + Vec::width <= cols; c += Vec::width) {
        Vec weight[R];
        for (int r = 0; r < R; ++r) {
            const std::uint8_t* at = w + r * row_bytes + std::ptrdiff_t{c} * Weights::size;
            // The same columns of the next block of rows.
            if (T == 1) prefetch(at + R * row_bytes);
            weight[r] = Weights::load(at);
        }
        for (int t = 0; t < T; ++t) {
            const Vec activation = Vec::load(x + t * stride + c);
            for (int r = 0; r < R; ++r) acc[r][t] = fma(weight[r], activation, acc[r][t]);
        }
    }
    if (c < cols) {
        for (int t = 0; t < T; ++t) {
            const Vec activation = load_part(x + t * stride + c, cols - c);
            for (int r = 0; r < R; ++r) {
                const std::uint8_t* at = w + r * row_bytes + std::ptrdiff_t{c} * Weights::size;
                acc[r][t] = fma(load_weights_part<Weights>(at, cols - c), activation, acc[r][t]);
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) y[t * y_stride + r] = acc[r][t].sum();
}

template <class Weights, int R>
inline void float_rows(const std::uint8_t* w, std::ptrdiff_t row_bytes, int cols, const Activations& x, float* y,
                       std::ptrdiff_t y_stride) {
    int t = 0;
    for (; t + 4 <= x.tokens; t += 4)
        float_block<Weights, R, 4>(w, row_bytes, cols, x.x + t * x.stride, x.stride, y + t * y_stride, y_stride);
    for (; t + 2 <= x.tokens; t += 2)
        float_block<Weights, R, 2>(w, row_bytes, cols, x.x + t * x.stride, x.stride, y + t * y_stride, y_stride);
    for (; t < x.tokens; ++t)
        float_block<Weights, R, 1>(w, row_bytes, cols, x.x + t * x.stride, x.stride, y + t * y_stride, y_stride);
}

template <class Weights>
void float_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{w.cols} * Weights::size;
    int r = row_begin;
    for (; r + 4 <= row_end; r += 4)
        float_rows<Weights, 4>(w.data + r * row_bytes, row_bytes, w.cols, x, y + r, y_stride);
    for (; r < row_end; ++r)
        float_rows<Weights, 1>(w.data + r * row_bytes, row_bytes, w.cols, x, y + r, y_stride);
}

}  // namespace
}  // namespace gangline
