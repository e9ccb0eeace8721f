// Where everything of a matrix under a two-level pattern N:M:V lies (codec samoyeds16:). A tile is 16 compressed rows, one a
// lane, of floor(16 / N) blocks of M rows each:
//   scales     [groups][16] fp16, only with codes; a group is `group` kept values of a lane, twice as many columns
//   shifts     [segments][16] bytes, only if N < M: in segment s lane r adds to row (r / N) * M + r % N + shift of the tile
//   zeros up to a multiple of 64 bytes
//   steps of 32 columns: 64 bytes of positions, one 32-bit word a lane, then the values.
// A step is 8 quads of four columns; two values of each are kept. Quad j has the positions of its two values in the bits
// 8 * (j % 4) + 4 * (j / 4) of the word, two bits each. The values:
//   bf16, fp16  64 bytes a quad: a 32-bit word a lane, the first value low
//   int8        64 bytes a plane, 4 bytes a lane; byte c of planes 0, 1 is the first, second value of quad c,
//               of planes 2, 3 the first, second value of quad 4 + c
//   int4        64 bytes for two planes, the first in the low nibbles
#pragma once

#include <cstddef>
#include <numeric>

#include "matrix.hpp"

namespace gangline {

constexpr int sparse_lanes = 16;
constexpr int sparse_step_columns = 32;
// Half a step: what lies between the ends of segments, of groups and of planes alike.
constexpr int half_columns = 16;
constexpr int half_values = 8;
constexpr int position_bytes = 64;
// Accumulators of a lane, M - N + 1, and rows of a tile are never more than these.
constexpr int most_accumulators = 16;
constexpr int most_sparse_rows = 128;

constexpr bool is_sparse(Format format) { return format >= Format::sparse_bf16; }

constexpr int sparse_value_bits(Format format) {
    return format == Format::sparse_int4 ? 4 : format == Format::sparse_int8 ? 8 : 16;
}

constexpr int sparse_step_bytes(Format format) {
    return position_bytes + sparse_lanes * sparse_value_bits(format) * sparse_step_columns / 16;
}

struct SparseLayout {
    int blocks = 0;        // of M rows, in a tile
    int rows = 0;          // of the matrix, made by a tile
    int accumulators = 0;  // of a lane: how many rows it may add to
    int halves = 0;        // steps of 16 columns that hold real columns
    int segment_halves = 0;
    int group_shift = 0;  // codes only: a group of weights is so many activation groups, as a power of two
    std::size_t shifts_begin = 0;  // of a tile, in bytes
    std::size_t steps_begin = 0;
    std::size_t tile_bytes = 0;

    static constexpr SparseLayout of(const Matrix& w) {
        const auto [n, m, v] = w.sparse;
        const int unit = std::lcm(v, 64);
        const int columns = (w.cols + unit - 1) / unit * unit;
        const bool codes = sparse_value_bits(w.format) < 16;
        SparseLayout t;
        t.blocks = sparse_lanes / n;
        t.rows = t.blocks * m;
        t.accumulators = m - n + 1;
        t.halves = (w.cols + half_columns - 1) / half_columns;
        t.segment_halves = n < m ? v / half_columns : t.halves;
        t.group_shift = w.group == 128 ? 2 : w.group == 64 ? 1 : 0;
        const int groups = codes ? (columns / 2 + w.group - 1) / w.group : 0;
        const int segments = n < m ? columns / v : 0;
        t.shifts_begin = static_cast<std::size_t>(groups) * sparse_lanes * 2;
        t.steps_begin = (t.shifts_begin + static_cast<std::size_t>(segments) * sparse_lanes + 63) / 64 * 64;
        t.tile_bytes = t.steps_begin + static_cast<std::size_t>(columns / sparse_step_columns) *
                                           static_cast<std::size_t>(sparse_step_bytes(w.format));
        return t;
    }
};

}  // namespace gangline
