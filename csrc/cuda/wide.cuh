// Sizes of the Hopper kernel, what it multiplies, and where its bytes lie in shared memory; see wgmma.cu.
#pragma once

#include <experts.cuh>

namespace wide {

using samoyeds::Part;
using samoyeds::STEP;
using samoyeds::TILE;
using samoyeds::expert_of;

constexpr i32 SETS = GANGLINE_SETS, UNIT = GANGLINE_UNIT, STAGES = GANGLINE_STAGES;
constexpr bool GATED = GANGLINE_GATED;
constexpr i32 GROUP = 128, THREADS = 3 * GROUP;  // threads of a warpgroup and of a block
constexpr i32 ROWS = 64, TOKENS = 128;           // of one warpgroup's product
constexpr i32 BK = 128, UNITS = BK / STEP / UNIT;
constexpr i32 ROW_BYTES = 128;                   // of values and of a panel of x
constexpr i32 TILE_BYTES = ROWS * ROW_BYTES, VALUE_BYTES = 2 * TILE_BYTES;
constexpr i32 PANEL_BYTES = TOKENS * ROW_BYTES;
constexpr i32 STAGE_BYTES = VALUE_BYTES + 2 * PANEL_BYTES;
static_assert(BK / 2 * 2 == ROW_BYTES && 64 * 2 == ROW_BYTES, "rows are as long as the swizzle");
static_assert(STAGE_BYTES % 1024 == 0, "blocks of eight rows start at multiples of 1024");
static_assert(SETS * 64 * GROUP * 4 <= STAGES * STAGE_BYTES, "room for the sums of up");

struct Extent {
  i32 columns;      // K, filled up to a multiple of 64
  i32 x_columns;    // columns of x, at most K, and its pitch
  i32 sub_pitch;    // bytes from one segment's sub-rows to the next's
  i32 row_tiles;    // tiles of 16 compressed rows of a part
  i32 out_rows;     // features
  i32 v;            // columns of a segment
};

__device__ inline i32 stages_of(const Extent& extent) { return (extent.columns + BK - 1) / BK; }

// Gate and up have the same rows; the two warpgroups of a plain product have neighbouring ones.
__device__ inline i32 first_tile(i32 row_block, i32 group) {
  return (GATED ? row_block : 2 * row_block + group) * (ROWS / TILE);
}

// Bytes from the start of a panel to a chunk of 16 bytes: chunks are exchanged within their row, by the row's number.
__device__ inline i32 swizzled(i32 row, i32 chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) * 16); }

// Where an operand's rows lie, as wgmma wants to know it: eight rows are a block of 1024 bytes, and the blocks follow each
// other. Bits 0-13: address / 16; 16-29: 1, unused with this swizzle; 32-45: bytes between blocks / 16; 62-63: 1, the
// swizzle of 128 bytes. Columns further on in a row are further addresses, added to the low bits.
__device__ inline u64 operand(const void* rows) {
  return static_cast<u64>((ptx::shared_address(rows) & 0x3FFFFu) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

}  // namespace wide
