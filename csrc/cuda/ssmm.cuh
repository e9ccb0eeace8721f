// The sizes of one compiled kernel, and the way of its bytes from global memory into shared memory.
//
// A block makes BM compressed rows (of one expert) times BN tokens. Warp (wm, wn) of it owns row tiles 2 wm and 2 wm + 1
// (16 compressed rows each) and NT groups of eight tokens. In a gated kernel the first of these tiles is of the gate
// matrix and the second the same rows of the up matrix, so that both meet in one thread.
//
// Along the columns it goes in stages of BK columns. A stage in shared memory:
//
//     values  [BM][BK / 2 values, PAD]         x  [BN][BK bf16, PAD]
//     meta    [BM / 16][BK / 64][32] words     sub  [UNITS][BM] bytes (only with two accumulators)
//
// Columns past the matrix are zeros in x and in the values; rows past it are copies of its last tile that nobody
// stores; token slots past an expert's last are zeros.
#pragma once

#include <experts.cuh>
#include <values.cuh>

namespace ssmm {

using samoyeds::Part;
using samoyeds::STEP;
using samoyeds::TILE;
using samoyeds::expert_of;

struct Extent {
  i32 columns;      // K, filled up to a multiple of 64
  i32 x_columns;    // columns of x, at most K, and its pitch
  i32 sub_pitch;    // compressed rows of the whole matrix: bytes from one segment's sub to the next's
  i32 row_tiles;    // tiles of 16 compressed rows of a part
  i32 out_rows;     // rows of the output: features
  i32 v;            // columns of a segment
  i32 group;        // values that share a scale; 0 without codes
  i32 groups;       // scales of a row
};

template <class Values_, i32 SETS_, bool GATED_, i32 WM_, i32 WN_, i32 NT_, i32 BK_, i32 UNIT_, i32 STAGES_>
struct Shape {
  using Values = Values_;
  static constexpr i32 SETS = SETS_;      // accumulators of a compressed row: M - N + 1
  static constexpr bool GATED = GATED_;
  static constexpr i32 WM = WM_, WN = WN_, NT = NT_, BK = BK_, STAGES = STAGES_;
  static constexpr i32 UNIT = UNIT_;      // steps of 32 columns between additions to the accumulators
  static constexpr i32 UNITS = BK / STEP / UNIT;
  static constexpr i32 THREADS = 32 * WM * WN;
  static constexpr i32 TILES = 2 * WM, BM = TILE * TILES, BN = 8 * NT * WN;
  static constexpr i32 VALUE_BYTES = BK / 2 * Values::BITS / 8;
  static constexpr i32 VALUE_PITCH = VALUE_BYTES + values::PAD, X_PITCH = 2 * BK + values::PAD;
  static constexpr i32 META_BYTES = BK / 64 * 128;
  static constexpr i32 X_AT = BM * VALUE_PITCH;
  static constexpr i32 META_AT = X_AT + BN * X_PITCH;
  static constexpr i32 SUB_AT = META_AT + TILES * META_BYTES;
  static constexpr i32 STAGE_BYTES = SUB_AT + (SETS > 1 ? UNITS * BM : 0);
  static_assert(BK % 64 == 0 && BK % (STEP * UNIT) == 0, "a stage is whole words of positions and whole units");
};

// What one block works on.
template <class S>
struct Work {
  Part first, second;  // the gate's and the up matrix'
  Extent extent;
  const i32* slots;  // of this block, in shared memory: row of x for every token slot, or -1
  const u16* x;
  i32 first_tile;    // of the block's rows

  // Row tile of the matrix and its part, for a tile of the block.
  __device__ inline i32 tile(i32 local) const {
    const i32 wanted = first_tile + (S::GATED ? local >> 1 : local);
    return wanted < extent.row_tiles ? wanted : extent.row_tiles - 1;
  }
  // Chosen field by field: an array indexed at run time would lie in local memory.
  __device__ inline const u8* of(i32 local, const u8* Part::* field) const {
    return S::GATED && (local & 1) ? second.*field : first.*field;
  }
};

template <class S>
__device__ inline void load_values(const Work<S>& work, u8* stage, i32 column) {
  constexpr i32 CHUNKS = S::VALUE_BYTES / 16;
  const i32 row_bytes = work.extent.columns / 2 * S::Values::BITS / 8;
  const i32 start = column / 2 * S::Values::BITS / 8;
#pragma unroll
  for (i32 i = ptx::thread(); i < S::BM * CHUNKS; i += S::THREADS) {
    const i32 row = i / CHUNKS, at = i % CHUNKS * 16, local = row / TILE;
    const bool real = start + at < row_bytes;
    const u64 offset = static_cast<u64>(work.tile(local) * TILE + row % TILE) * row_bytes + (real ? start + at : 0);
    ptx::copy16(stage + row * S::VALUE_PITCH + at, work.of(local, &Part::values) + offset, real);
  }
}

template <class S>
__device__ inline void load_x(const Work<S>& work, u8* stage, i32 column) {
  constexpr i32 CHUNKS = S::BK / 8;
#pragma unroll
  for (i32 i = ptx::thread(); i < S::BN * CHUNKS; i += S::THREADS) {
    const i32 slot = i / CHUNKS, at = column + i % CHUNKS * 8, token = work.slots[slot];
    const bool real = token >= 0 && at < work.extent.x_columns;
    const u64 offset = real ? static_cast<u64>(token) * work.extent.x_columns + at : 0;
    ptx::copy16(stage + S::X_AT + slot * S::X_PITCH + i % CHUNKS * 16, work.x + offset, real);
  }
}

template <class S>
__device__ inline void load_positions(const Work<S>& work, u8* stage, i32 column) {
  constexpr i32 CHUNKS = S::META_BYTES / 16;
  const i32 words = work.extent.columns / 64;
  for (i32 i = ptx::thread(); i < S::TILES * CHUNKS; i += S::THREADS) {
    const i32 local = i / CHUNKS, wanted = column / 64 + i % CHUNKS / 8;
    const i32 word = wanted < words ? wanted : words - 1;
    const u64 offset = (static_cast<u64>(work.tile(local)) * words + word) * 128 + i % 8 * 16;
    ptx::copy16(stage + S::META_AT + i * 16, work.of(local, &Part::meta) + offset, true);
  }
}

template <class S>
__device__ inline void load_sub(const Work<S>& work, u8* stage, i32 column) {
  for (i32 i = ptx::thread(); i < S::UNITS * S::TILES; i += S::THREADS) {
    const i32 unit = i / S::TILES, local = i % S::TILES;
    const i32 wanted = column + unit * S::UNIT * STEP, last = work.extent.columns - 1;
    const i32 segment = (wanted < last ? wanted : last) / work.extent.v;
    const u64 offset = static_cast<u64>(segment) * work.extent.sub_pitch + work.tile(local) * TILE;
    ptx::copy16(stage + S::SUB_AT + i * TILE, work.of(local, &Part::sub) + offset, true);
  }
}

// Starts the copies of stage `number`; exactly one group, empty from stage `last` on.
template <class S>
__device__ inline void load_stage(const Work<S>& work, u8* stage, i32 number, i32 last) {
  if (number < last) {
    const i32 column = number * S::BK;
    load_values<S>(work, stage, column);
    load_x<S>(work, stage, column);
    load_positions<S>(work, stage, column);
    if (S::SETS > 1) load_sub<S>(work, stage, column);
  }
  ptx::commit();
}

}  // namespace ssmm
