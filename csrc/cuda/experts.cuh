// What the kernels know of experts: where their matrices lie, and which tokens are whose.
#pragma once

#include <ptx.cuh>

namespace samoyeds {

constexpr i32 TILE = 16;  // compressed rows
constexpr i32 STEP = 32;  // columns of one sparse product

// Rows of one expert's matrix; see formats/samoyeds.py for the bytes.
struct Part {
  const u8* values;
  const u8* meta;
  const u8* scales;
  const u8* sub;
};

// The last e with tiles[e] <= tile: experts without tokens have no tile.
__device__ inline i32 expert_of(const i32* tiles, i32 experts, i32 tile) {
  i32 low = 0, high = experts;
  while (high - low > 1) {
    const i32 middle = (low + high) / 2;
    if (tiles[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace samoyeds
