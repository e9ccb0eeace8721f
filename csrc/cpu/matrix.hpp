// The words that every part of the native core shares: a weight matrix in the bytes of a codec, activations, a gate.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gangline {

// How the weights of a matrix lie in bytes. `tile_*`: the project's own 16-row tiles (see tile_layout.hpp); `q*`: ggml
// blocks, row after row; `f*`, `bf16`: plain numbers, row after row; `sparse_*`: tiles of what the two-level pattern of
// Samoyeds keeps (see sparse_layout.hpp), as plain numbers or codes.
enum class Format : int {
    f32, f16, bf16, tile_int2, tile_int3, tile_int4, tile_int6, tile_int8, tile_mxfp4, q4_0, q8_0,
    q4_k, q5_k, q6_k, sparse_bf16, sparse_f16, sparse_int8, sparse_int4
};
constexpr int formats = 18;

// Of every `m` rows, `n` are kept in each segment of `v` columns; in what is kept, two of every four columns.
struct SparsePattern {
    int n = 1, m = 1, v = 64;
};

// One weight matrix (rows = out features, cols = in features); it does not own its bytes.
struct Matrix {
    const std::uint8_t* data = nullptr;
    int rows = 0;
    int cols = 0;
    Format format = Format::f32;
    int group = 32;         // columns that share a scale (tiles); kept values of a row that do (sparse codes)
    bool has_zeros = false;  // asymmetric: a zero point beside each scale (integer tiles only)
    bool byte_scales = false;  // scales are bytes under one of each row (integer tiles only)
    SparsePattern sparse;    // sparse_* only
};

// Integer formats multiply with activations rounded to int8, one scale per group of columns.
constexpr bool needs_int8_activations(Format format) {
    return format >= Format::tile_int2 && format != Format::sparse_bf16 && format != Format::sparse_f16;
}

// Of sparse codes, whose groups are 64 columns and more.
constexpr int sparse_activation_group = 64;

// Columns that share one activation scale, so that no group of the weights ends inside them.
constexpr int activation_group(const Matrix& w) {
    switch (w.format) {
        case Format::q4_0: case Format::q8_0: return 32;
        case Format::q4_k: case Format::q5_k: case Format::q6_k: return 128;
        case Format::sparse_int8: case Format::sparse_int4: return sparse_activation_group;
        default: return w.group;
    }
}

// Activations of `tokens` rows. fp32 rows are always there; the int8 form only where asked for (quantize_rows).
// Columns beyond `cols`, up to `padded` (a multiple of the group), are zero in the int8 form.
struct Activations {
    const float* x = nullptr;          // [tokens, stride]
    std::ptrdiff_t stride = 0;         // floats from row to row
    int tokens = 0;
    int cols = 0;
    int group = 0;                     // 0: no int8 form
    int padded = 0;
    const std::int8_t* q = nullptr;    // [tokens, padded], in [-127, 127]
    const float* scale = nullptr;      // [tokens, padded / group]
    const std::int32_t* sum = nullptr; // [tokens, padded / group]: sum of q over the group
};

// y[t, r] for r in [row_begin, row_end) and all tokens; y is [tokens, y_stride] fp32, indexed by the absolute row.
// row_begin is a multiple of 16; row_end is one too or equals rows. Every result is independent of how rows are split
// between calls and of how many tokens the call has: the sum over columns always runs in the same order.
using MatmulRows = void (*)(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y,
                            std::ptrdiff_t y_stride);

}  // namespace gangline
