// Where everything of a tiled matrix lies. Rows go in blocks of 16; one block holds
//   scales     [groups][16] fp16 (mxfp4: E8M0 bytes), zero points [groups][16] bytes (asymmetric formats only), zeros up to
//              a multiple of 64 bytes, then the codes of one group after another.
// A quad is 4 neighbouring columns of the 16 rows, 64 positions: position 4 * row + j is column 4 * quad + j, so that a dot
// product instruction over 4 bytes adds within one row. Codes are unsigned:
//   int8        64 bytes a quad
//   int4, mxfp4 64 bytes for two quads: the first in the low nibbles
//   int2        64 bytes for four quads: quad i in bits 2i and 2i + 1
//   int3        per group first the low two bits of all quads as int2, then 64 bytes for eight quads: bit i is the high
//               bit of quad i
#pragma once

#include <cstddef>

#include "matrix.hpp"

namespace gangline {

constexpr int tile_rows = 16;
// A group of activations whose largest magnitude is below this counts as all zero: 127 over it would not be finite.
constexpr float smallest_magnitude = 1e-36F;
constexpr int quad_columns = 4;
constexpr int quad_bytes = 64;
// Every group is a multiple of this many columns, and every format stores this many as whole 64-byte vectors.
constexpr int step_columns = 32;
constexpr int step_quads = step_columns / quad_columns;

constexpr bool is_tiled(Format format) { return format >= Format::tile_int2 && format <= Format::tile_mxfp4; }

constexpr int code_bits(Format format) {
    switch (format) {
        case Format::tile_int2: return 2;
        case Format::tile_int3: return 3;
        case Format::tile_int8: return 8;
        default: return 4;
    }
}

// What is subtracted from a symmetric format's codes; of mxfp4, from its doubled values made unsigned.
constexpr int code_zero(Format format) {
    return format == Format::tile_mxfp4 ? 12 : 1 << (code_bits(format) - 1);
}

struct TileLayout {
    int groups = 0;
    std::size_t zeros_begin = 0;  // of a row block, in bytes
    std::size_t codes_begin = 0;
    std::size_t group_bytes = 0;  // codes of one group
    std::size_t block_bytes = 0;  // a whole row block

    static constexpr TileLayout of(Format format, int group, bool has_zeros, int cols) {
        TileLayout t;
        t.groups = (cols + group - 1) / group;
        const std::size_t entries = static_cast<std::size_t>(t.groups) * tile_rows;
        t.zeros_begin = entries * (format == Format::tile_mxfp4 ? 1 : 2);
        t.codes_begin = (t.zeros_begin + (has_zeros ? entries : 0) + 63) / 64 * 64;
        t.group_bytes = static_cast<std::size_t>(group) * tile_rows * static_cast<std::size_t>(code_bits(format)) / 8;
        t.block_bytes = t.codes_begin + t.group_bytes * static_cast<std::size_t>(t.groups);
        return t;
    }
    static constexpr TileLayout of(const Matrix& w) { return of(w.format, w.group, w.has_zeros, w.cols); }
};

}  // namespace gangline
