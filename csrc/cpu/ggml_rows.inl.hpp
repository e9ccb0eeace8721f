// y = x W^T for rows of ggml blocks (Q4_0, Q8_0) as they lie in a GGUF file, with activations rounded to int8 in
// groups of 32: exact integer dot products within a block, fp32 between blocks, in the same order whatever the number of
// rows and tokens. Blocks need no alignment.
//
//   Q4_0  32 weights, 18 bytes: fp16 d, 16 bytes of nibbles (low ones first): d * (q - 8)
//   Q8_0  32 weights, 34 bytes: fp16 d, 32 signed bytes: d * q
#pragma once

#if !defined(GANGLINE_SCALAR) && defined(__AVX2__)
#include "ggml_avx2.inl.hpp"
#else
#include "ggml_plain.inl.hpp"
#endif

namespace gangline {
namespace {

template <class Format>
void ggml_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const int blocks = w.cols / ggml_block;
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{blocks} * Format::bytes;
    int r = row_begin;
    for (; r + 2 <= row_end; r += 2) ggml_rows<Format, 2>(w.data + r * row_bytes, row_bytes, blocks, x, y + r, y_stride);
    for (; r < row_end; ++r) ggml_rows<Format, 1>(w.data + r * row_bytes, row_bytes, blocks, x, y + r, y_stride);
}

}  // namespace
}  // namespace gangline
