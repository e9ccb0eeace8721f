// From the accumulators of a tile to rows of y.
#pragma once

#include "sparse_layout.hpp"

namespace gangline {
namespace {

// Rows of the matrix that a call asks for, all in one tile or not.
struct RowRange {
    int begin = 0;
    int end = 0;
};

// sums: [accumulators][16] of one token. Accumulator a of lane r belongs to row (r / N) * M + r % N + a of the tile; where
// several meet (1 < N < M) they are added in this order. Only rows inside `wanted` are stored.
inline void store_sums(const float* sums, const SparsePattern& pattern, const SparseLayout& layout, int tile, RowRange wanted,
                       float* y) {
    const int first = tile * layout.rows;
    if (pattern.n == 1 && first >= wanted.begin && first + layout.rows <= wanted.end) {
        // No two meet, and no row is left out.
        for (int b = 0; b < sparse_lanes; ++b) {
            for (int a = 0; a < pattern.m; ++a) y[first + b * pattern.m + a] = sums[a * sparse_lanes + b];
        }
        return;
    }
    float rows[most_sparse_rows] = {};
    for (int b = 0; b < layout.blocks; ++b) {
        for (int a = 0; a < layout.accumulators; ++a) {
            for (int i = 0; i < pattern.n; ++i) {
                rows[b * pattern.m + i + a] += sums[a * sparse_lanes + b * pattern.n + i];
            }
        }
    }
    const int begin = first > wanted.begin ? first : wanted.begin;
    const int end = first + layout.rows < wanted.end ? first + layout.rows : wanted.end;
    for (int row = begin; row < end; ++row) y[row] = rows[row - first];
}

}  // namespace
}  // namespace gangline
