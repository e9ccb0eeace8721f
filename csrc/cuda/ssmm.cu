// Products of Samoyeds matrices with selected rows of x, for all experts of a layer in one launch.
//
//     gated:  h[p] = act(W_gate x[row[p]]) * (W_up x[row[p]])   bf16 [P, out_rows]
//     plain:  y[p] = W x[row[p]]                                fp32 [P, out_rows]
//
// for the pairs p = starts[e] ... starts[e + 1] - 1 of every expert e. Rows of x are read in place: no permuted copy.
// The sparse operand is the weight (A), so the product is W x^T; it is stored transposed, one compact row a pair.
//
// A compressed row keeps its place while k advances, but the output row that it adds to changes at every segment.
// So each unit of UNIT * 32 columns (never more than a segment, nor than a group of scales) starts at zero, and its
// sum is added, under a predicate, to the accumulator that `sub` names. The unit is the inner loop and tokens the
// outer one: only eight tokens' sums are pending at a time, and a warp has registers for 32 rows times 64 tokens.
//
// Where few rows and tokens leave multiprocessors idle, the columns are split: `splits` neighbouring blocks make the
// same rows and tokens, each from its own stages, and store sums in fp32 as [splits][1 or 2 if gated][pairs][out_rows];
// gate.cu or combine.cu adds them in their order.
//
// Compiled with GANGLINE_VALUES, _SETS, _GATED, _SPLIT (of a gated kernel), _ACTIVATION, _WM, _WN, _NT, _BK, _UNIT and
// _STAGES; grid (blocks of rows * splits, tiles of tokens), 32 WM WN threads, STAGES * STAGE_BYTES + 4 BN bytes of
// shared memory.
//
// Source: Samoyeds, arXiv 2503.10725. Ours differs: fp32 accumulation (not fp16); units that start at zero instead of
// copies of accumulators; all experts in one launch; positions of two instructions in one word; rows and columns that
// do not divide evenly.
#include <gate.cuh>
#include <ssmm.cuh>

namespace ssmm {

template <class S>
struct Sums {
  float at[S::SETS][2][S::NT][4];
};

struct Lane {
  i32 id, row, column;  // of a fragment: row g, first column 2t
  i32 wm, wn;
};

// Scales of rows g and g + 8 of both tiles, for every unit of a stage.
template <class S>
__device__ inline void load_scales(float (&scale)[S::UNITS][2][2], const Work<S>& work, const Lane& lane, i32 column) {
  for (i32 unit = 0; unit < S::UNITS; ++unit) {
    const i32 wanted = (column + unit * S::UNIT * STEP) / 2 / work.extent.group;
    const i32 group = wanted < work.extent.groups ? wanted : work.extent.groups - 1;
    for (i32 i = 0; i < 4; ++i) {
      const i32 local = 2 * lane.wm + (i >> 1);
      const u64 row = work.tile(local) * TILE + lane.row + (i & 1) * 8;
      const u16* from = reinterpret_cast<const u16*>(work.of(local, &Part::scales)) + row * work.extent.groups + group;
      scale[unit][i >> 1][i & 1] = ptx::half_to_float(*from);
    }
  }
}

// Adds a unit's sums of eight tokens to the accumulators. c: registers 0, 1 are row g, registers 2, 3 row g + 8.
template <class S>
__device__ inline void add_unit(Sums<S>& sums, i32 n, const float (&unit)[2][4], const u32 (&sub)[2][2],
                                const float (&scale)[2][2]) {
#pragma unroll
  for (i32 tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (i32 c = 0; c < 4; ++c) {
      const float more = S::Values::CODES ? unit[tile][c] * scale[tile][c >> 1] : unit[tile][c];
      if (S::SETS == 1) {
        sums.at[0][tile][n][c] += more;
      } else if (sub[tile][c >> 1] == 0) {
        sums.at[0][tile][n][c] += more;
      } else {
        sums.at[S::SETS - 1][tile][n][c] += more;
      }
    }
  }
}

template <class S, i32 U>
__device__ inline void compute_unit(Sums<S>& sums, const u8* stage, const Lane& lane, const float (&scale)[2][2]) {
  u32 a[S::UNIT][2][4], positions[S::UNIT][2], sub[2][2] = {};
#pragma unroll
  for (i32 tile = 0; tile < 2; ++tile) {
    const i32 local = 2 * lane.wm + tile;
    const u32* words = reinterpret_cast<const u32*>(stage + S::META_AT + local * S::META_BYTES);
#pragma unroll
    for (i32 s = 0; s < S::UNIT; ++s) {
      const i32 step = U * S::UNIT + s;
      S::Values::template fragment<S::VALUE_PITCH>(a[s][tile], stage + local * TILE * S::VALUE_PITCH, lane.id, step);
      positions[s][tile] = words[step / 2 * 32 + lane.id];
    }
    if (S::SETS > 1) {
      const u8* of_rows = stage + S::SUB_AT + U * S::BM + local * TILE + lane.row;
      sub[tile][0] = of_rows[0];
      sub[tile][1] = of_rows[8];
    }
  }
#pragma unroll
  for (i32 n = 0; n < S::NT; ++n) {
    // Matrix i of a token's 32 columns is columns 8i ... 8i + 7: register i of the B fragment.
    const i32 slot = (lane.wn * S::NT + n) * 8 + (lane.id & 7);
    const u8* x = stage + S::X_AT + slot * S::X_PITCH + (lane.id >> 3) * 16;
    float unit[2][4] = {};
#pragma unroll
    for (i32 s = 0; s < S::UNIT; ++s) {
      const i32 step = U * S::UNIT + s;
      u32 b[4];
      ptx::load_matrices(b, x + step * STEP * 2);
#pragma unroll
      for (i32 tile = 0; tile < 2; ++tile) {
        if (step % 2 == 0) {
          ptx::mma_sp<0>(unit[tile], a[s][tile], b, positions[s][tile]);
        } else {
          ptx::mma_sp<1>(unit[tile], a[s][tile], b, positions[s][tile]);
        }
      }
    }
    add_unit<S>(sums, n, unit, sub, scale);
  }
}

template <class S, i32 U = 0>
__device__ inline void compute_stage(Sums<S>& sums, const u8* stage, const Lane& lane,
                                     const float (&scale)[S::UNITS][2][2]) {
  compute_unit<S, U>(sums, stage, lane, scale[U]);
  if constexpr (U + 1 < S::UNITS) compute_stage<S, U + 1>(sums, stage, lane, scale);
}

// The stages of one split are first ... last - 1.
template <class S>
__device__ inline void multiply(Sums<S>& sums, const Work<S>& work, const Lane& lane, u8* stages, i32 first, i32 last) {
  for (i32 s = 0; s < S::STAGES - 1; ++s) load_stage<S>(work, stages + s * S::STAGE_BYTES, first + s, last);
  i32 now = 0, next = S::STAGES - 1;
  for (i32 s = first; s < last; ++s) {
    float scale[S::UNITS][2][2] = {};
    if (S::Values::CODES) load_scales<S>(scale, work, lane, s * S::BK);
    ptx::wait<S::STAGES - 2>();
    // Everyone's copies of this stage are here, and everyone is done with the stage before, which is filled next.
    ptx::sync_block();
    load_stage<S>(work, stages + next * S::STAGE_BYTES, s + S::STAGES - 1, last);
    compute_stage<S>(sums, stages + now * S::STAGE_BYTES, lane, scale);
    now = now + 1 == S::STAGES ? 0 : now + 1;
    next = next + 1 == S::STAGES ? 0 : next + 1;
  }
}

// The features of compressed row r are SETS r ... SETS r + SETS - 1: accumulators of one row lie side by side. With two
// sets the number of features is even (the caller sees to it), so that both exist or none.
template <class S>
__device__ inline void store_gated(const Sums<S>& sums, const Work<S>& work, const Lane& lane, u16* h, i32 n, i32 c,
                                   const gate::Form& form) {
  const i32 feature = S::SETS * ((work.first_tile + lane.wm) * TILE + lane.row + (c >> 1) * 8);
  float out[2] = {};
  for (i32 set = 0; set < S::SETS; ++set) {
    out[set] = gate::apply<GANGLINE_ACTIVATION>(form, sums.at[set][0][n][c], sums.at[set][1][n][c]);
  }
  const u32 both = ptx::to_bf16x2(out[0], out[1]);
  if (feature >= work.extent.out_rows) return;
  if (S::SETS == 2) {
    *reinterpret_cast<u32*>(h + feature) = both;
  } else {
    h[feature] = static_cast<u16>(both);
  }
}

template <class S>
__device__ inline void store_plain(const Sums<S>& sums, const Work<S>& work, const Lane& lane, float* y, i32 n, i32 c) {
  for (i32 tile = 0; tile < 2; ++tile) {
    const i32 row = (work.first_tile + 2 * lane.wm + tile) * TILE + lane.row + (c >> 1) * 8;
    const i32 feature = S::SETS * row;
    if (feature >= work.extent.out_rows) continue;
    y[feature] = sums.at[0][tile][n][c];
    if (S::SETS == 2) y[feature + 1] = sums.at[S::SETS - 1][tile][n][c];
  }
}

// Gate and up apart, `matrix` numbers from each other, for gate.cu.
template <class S>
__device__ inline void store_both(const Sums<S>& sums, const Work<S>& work, const Lane& lane, float* y, u64 matrix,
                                  i32 n, i32 c) {
  const i32 feature = S::SETS * ((work.first_tile + lane.wm) * TILE + lane.row + (c >> 1) * 8);
  if (feature >= work.extent.out_rows) return;
  for (i32 tile = 0; tile < 2; ++tile) {
    y[tile * matrix + feature] = sums.at[0][tile][n][c];
    if (S::SETS == 2) y[tile * matrix + feature + 1] = sums.at[S::SETS - 1][tile][n][c];
  }
}

// Where the sums of a block go.
struct Target {
  void* out;
  i32 first_pair, pairs;  // of the block's expert, from its first token slot
  u64 part, matrix;       // numbers before this split's part, and of one matrix of it
};

template <class S, bool SPLIT>
__device__ inline void store(const Sums<S>& sums, const Work<S>& work, const Lane& lane, const Target& target,
                             const gate::Form& form) {
#pragma unroll
  for (i32 n = 0; n < S::NT; ++n) {
#pragma unroll
    for (i32 c = 0; c < 4; ++c) {
      const i32 slot = (lane.wn * S::NT + n) * 8 + lane.column + (c & 1);
      if (slot >= target.pairs) continue;
      const u64 at = static_cast<u64>(target.first_pair + slot) * work.extent.out_rows + target.part;
      if (S::GATED && SPLIT) {
        store_both<S>(sums, work, lane, static_cast<float*>(target.out) + at, target.matrix, n, c);
      } else if (S::GATED) {
        store_gated<S>(sums, work, lane, static_cast<u16*>(target.out) + at, n, c, form);
      } else {
        store_plain<S>(sums, work, lane, static_cast<float*>(target.out) + at, n, c);
      }
    }
  }
}

}  // namespace ssmm

using KernelShape = ssmm::Shape<values::GANGLINE_VALUES, GANGLINE_SETS, GANGLINE_GATED, GANGLINE_WM, GANGLINE_WN,
                                GANGLINE_NT, GANGLINE_BK, GANGLINE_UNIT, GANGLINE_STAGES>;

// parts: [experts][2], the second unused unless gated. starts, tiles: [experts + 1], first pair and first tile of tokens
// of every expert. rows: row of x for every pair, or null where pair p is row p. all_pairs: rows of out.
extern "C" __global__ void __launch_bounds__(KernelShape::THREADS)
    gangline_ssmm(const ssmm::Part* parts, const i32* starts, const i32* tiles, const i32* rows, const u16* x,
                  void* out, i32 experts, i32 splits, i32 all_pairs, i32 columns, i32 x_columns, i32 sub_pitch, i32 row_tiles, i32 out_rows, i32 v,
                  i32 group, i32 groups, float alpha, float limit, i32 late) {
  using S = KernelShape;
  GANGLINE_SHARED(memory);
  if (ptx::block_y() >= tiles[experts]) return;
  const i32 expert = ssmm::expert_of(tiles, experts, ptx::block_y());
  const i32 first_pair = starts[expert] + (ptx::block_y() - tiles[expert]) * S::BN;
  const i32 pairs = starts[expert + 1] - first_pair;

  i32* slots = reinterpret_cast<i32*>(memory + S::STAGES * S::STAGE_BYTES);
  for (i32 slot = ptx::thread(); slot < S::BN; slot += S::THREADS) {
    slots[slot] = slot >= pairs ? -1 : rows == nullptr ? first_pair + slot : rows[first_pair + slot];
  }
  ptx::sync_block();

  const ssmm::Extent extent{columns, x_columns, sub_pitch, row_tiles, out_rows, v, group, groups};
  const ssmm::Work<S> work{parts[2 * expert], parts[2 * expert + 1], extent, slots, x,
                           ptx::block_x() / splits * (S::GATED ? S::WM : S::TILES)};
  const i32 lane = ptx::thread() % 32, warp = ptx::thread() / 32;
  const ssmm::Lane of_fragment{lane, lane / 4, lane % 4 * 2, warp / S::WN, warp % S::WN};

  ssmm::Sums<S> sums = {};
  const i32 stages = (columns + S::BK - 1) / S::BK, split = ptx::block_x() % splits;
  ssmm::multiply<S>(sums, work, of_fragment, memory, stages * split / splits, stages * (split + 1) / splits);
  const u64 matrix = static_cast<u64>(all_pairs) * out_rows;
  const ssmm::Target target{out, first_pair, pairs, split * (S::GATED ? 2 * matrix : matrix), matrix};
  ssmm::store<S, GANGLINE_SPLIT>(sums, work, of_fragment, target, gate::Form{alpha, limit, late});
}
