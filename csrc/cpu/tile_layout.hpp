// Where everything of a tiled matrix lies. Rows go in blocks of 16, their columns in stripes of four groups (the last may have
// fewer), so that scales lie beside their codes and one stream of bytes feeds a kernel from end to end. With byte scales a row
// block begins with the fp32 scales of its rows, by which theirs are multiplied. One stripe holds
//   scales     [groups][16] fp16 (mxfp4: E8M0 bytes; byte scales: signed bytes), zero points [groups][16] bytes (asymmetric formats only), zeros up to
//              a multiple of 64 bytes (of four groups there are none to add), then the codes of one group after another.
// A quad is 4 neighbouring columns of the 16 rows, 64 positions: position 4 * row + j is column 4 * quad + j, so that a dot
// product instruction over 4 bytes adds within one row. Codes are unsigned:
//   int8        64 bytes a quad
//   int4, mxfp4 64 bytes for two quads: the first in the low nibbles
//   int2        64 bytes for four quads: quad i in bits 2i and 2i + 1
//   int3        per group first the low two bits of all quads as int2, then 64 bytes for eight quads: bit i is the high
//               bit of quad i
//   int6        per group first the low four bits of all quads as int4, then the two high bits of all as int2
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
        case Format::tile_int6: return 6;
        case Format::tile_int8: return 8;
        default: return 4;
    }
}

// What is subtracted from a symmetric format's codes; of mxfp4, from its doubled values made unsigned.
constexpr int code_zero(Format format) {
    return format == Format::tile_mxfp4 ? 12 : 1 << (code_bits(format) - 1);
}

constexpr int stripe_groups = 4;

struct TileLayout {
    int groups = 0;
    std::size_t row_scale_bytes = 0;  // before the first stripe
    std::size_t entry_bytes = 0;   // one scale
    std::size_t zero_bytes = 0;    // one zero point: 1 or 0
    std::size_t group_bytes = 0;   // codes of one group
    std::size_t stripe_bytes = 0;  // a whole stripe
    std::size_t block_bytes = 0;   // a whole row block

    static constexpr TileLayout of(Format format, int group, bool has_zeros, int cols, bool byte_scales = false) {
        TileLayout t;
        t.groups = (cols + group - 1) / group;
        t.row_scale_bytes = byte_scales ? tile_rows * sizeof(float) : 0;
        t.entry_bytes = format == Format::tile_mxfp4 || byte_scales ? 1 : 2;
        t.zero_bytes = has_zeros ? 1 : 0;
        t.group_bytes = static_cast<std::size_t>(group) * tile_rows * static_cast<std::size_t>(code_bits(format)) / 8;
        t.stripe_bytes = t.head_bytes(stripe_groups) + t.group_bytes * stripe_groups;
        const int rest = t.groups % stripe_groups;
        t.block_bytes = t.row_scale_bytes + t.stripe_bytes * static_cast<std::size_t>(t.groups / stripe_groups) +
                        t.head_bytes(rest) + t.group_bytes * static_cast<std::size_t>(rest);
        return t;
    }
    static constexpr TileLayout of(const Matrix& w) { return of(w.format, w.group, w.has_zeros, w.cols, w.byte_scales); }

    // Of a stripe of so many groups: where its zero points and its codes begin.
    constexpr std::size_t zeros_begin(int count) const { return static_cast<std::size_t>(count * tile_rows) * entry_bytes; }
    constexpr std::size_t head_bytes(int count) const {
        return (static_cast<std::size_t>(count * tile_rows) * (entry_bytes + zero_bytes) + 63) / 64 * 64;
    }
    // Groups of the stripe that begins with the group `first`.
    constexpr int groups_from(int first) const { return groups - first < stripe_groups ? groups - first : stripe_groups; }
};

// Where one group of a row block lies, from the row block's begin.
struct GroupPlace {
    std::size_t scales, zeros, codes;

    static constexpr GroupPlace of(const TileLayout& t, int group) {
        const int inside = group % stripe_groups, count = t.groups_from(group - inside);
        const std::size_t stripe = t.row_scale_bytes + static_cast<std::size_t>(group / stripe_groups) * t.stripe_bytes;
        const std::size_t before = static_cast<std::size_t>(inside);
        return {stripe + before * tile_rows * t.entry_bytes, stripe + t.zeros_begin(count) + before * tile_rows,
                stripe + t.head_bytes(count) + before * t.group_bytes};
    }
};

}  // namespace gangline
