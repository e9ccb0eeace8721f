// Where the rows of a weight matrix lie.
#pragma once

#include <algorithm>

#include "matrix.hpp"
#include "sparse_layout.hpp"
#include "tile_layout.hpp"

namespace gangline {

// Offset of a row in bytes; of tiles, where its block of 16 rows begins.
inline std::size_t row_offset(const Matrix& w, int row) {
    const std::size_t r = static_cast<std::size_t>(row);
    const std::size_t cols = static_cast<std::size_t>(w.cols);
    switch (w.format) {
        case Format::f32: return r * cols * 4;
        case Format::f16: case Format::bf16: return r * cols * 2;
        case Format::q4_0: return r * (cols / 32 * 18);
        case Format::q8_0: return r * (cols / 32 * 34);
        case Format::q4_k: return r * (cols / 256 * 144);
        case Format::q5_k: return r * (cols / 256 * 176);
        case Format::q6_k: return r * (cols / 256 * 210);
        case Format::sparse_bf16: case Format::sparse_f16: case Format::sparse_int8: case Format::sparse_int4: {
            const SparseLayout tile = SparseLayout::of(w);
            return r / static_cast<std::size_t>(tile.rows) * tile.tile_bytes;
        }
        default: return r / tile_rows * TileLayout::of(w).block_bytes;
    }
}

// Asks for the first cache lines of a row, so that the wait for memory overlaps with what comes before it: as many as are
// under way until the processor's own look ahead has found the stream.
inline void prefetch_rows(const Matrix& w, int row) {
    constexpr std::size_t bytes = 4096;
    const std::uint8_t* at = w.data + row_offset(w, row);
#if defined(__GNUC__) || defined(__clang__)
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
#else
    static_cast<void>(at);
#endif
}

}  // namespace gangline
