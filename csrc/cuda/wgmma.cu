// The products of ssmm.cu for prompts on Hopper (sm_90a): the same results from wgmma.mma_async.sp and bulk copies.
//
// A block has two warpgroups that multiply and one that brings data. The first two make 64 compressed rows times 128
// token slots each: of one matrix, or (gated) the same rows of gate and up. A stage is BK = 128 columns in shared memory:
//
//     values  [2][64 rows][64 bf16]     two tiles, copied whole by the tensor copy engine
//     x       [2][128 slots][64 bf16]   two panels of 64 columns, gathered 16 bytes at a time by the third warpgroup
//
// Rows of 128 bytes in both, swizzled as wgmma wants them. Positions and sub-rows go from global memory to registers,
// one stage ahead. A barrier a stage says that it is full (bytes of the tiles, and every gathering thread once its
// copies are there and published), another that all eight multiplying warps are done with it.
//
// A compressed row adds to another output row in every segment: each unit of UNIT * 32 columns starts at zero, and its
// 64 sums a thread are added under a predicate to one of two sets. While one warpgroup adds, the other's products run.
//
// Compiled with GANGLINE_SETS, _GATED, _ACTIVATION, _UNIT and _STAGES; grid (blocks of rows, tiles of tokens), 384
// threads, SHARED_BYTES of shared memory.
//
// Source: Samoyeds, arXiv 2503.10725, whose kernels are for mma.sp; the PTX ISA for layouts.
#include <gate.cuh>
#include <ptx_hopper.cuh>
#include <wide.cuh>

namespace wide {

struct Job {
  Extent extent;
  i32 first_pair, pairs;  // of the expert, from this block's first token slot
  i32 row_block;
};

struct Stages {
  u8* memory;
  u64* full;
  u64* empty;
};

// This warpgroup's threads copy x[slots] of one stage.
__device__ inline void gather(const u16* x, const i32* slots, u8* stage, const Extent& extent, i32 column, i32 thread) {
  constexpr i32 CHUNKS = BK / 8;
  const i32 chunk = thread % CHUNKS, at = column + chunk * 8;
  u8* panel = stage + VALUE_BYTES + chunk / 8 * PANEL_BYTES;
#pragma unroll 4
  for (i32 slot = thread / CHUNKS; slot < TOKENS; slot += GROUP / CHUNKS) {
    const i32 token = slots[slot];
    const bool real = token >= 0 && at < extent.x_columns;
    const u64 offset = real ? static_cast<u64>(token) * extent.x_columns + at : 0;
    ptx::copy16(panel + swizzled(slot, chunk % 8), x + offset, real);
  }
  ptx::commit();
}

// The warpgroup that brings data. Its copies of x are LAG stages under way when it says that a stage is full.
__device__ inline void bring(const Job& job, const ptx::TensorMap* maps, const u16* x, const i32* slots,
                             const Stages& stages, i32 thread) {
  constexpr i32 LAG = 2;
  static_assert(LAG < STAGES, "else a stage would be awaited that nobody calls full");
  const i32 count = stages_of(job.extent);
  if (thread == 0) {
    ptx::acquire_map(maps);
    if (GATED) ptx::acquire_map(maps + 1);
  }
  for (i32 s = 0; s < count + LAG; ++s) {
    if (s < count) {
      const i32 slot = s % STAGES;
      u8* stage = stages.memory + slot * STAGE_BYTES;
      if (s >= STAGES) ptx::wait_phase(stages.empty + slot, (s / STAGES - 1) & 1);
      if (thread == 0) {
        ptx::arrive_expecting(stages.full + slot, VALUE_BYTES);
        for (i32 group = 0; group < 2; ++group) {
          ptx::load_tile(stage + group * TILE_BYTES, maps + (GATED ? group : 0), s * BK / 2,
                         first_tile(job.row_block, group) * TILE, stages.full + slot);
        }
      }
      gather(x, slots, stage, job.extent, s * BK, thread);
    } else {
      ptx::commit();
    }
    if (s < LAG) continue;
    ptx::wait<LAG>();
    ptx::publish_writes();
    ptx::arrive(stages.full + (s - LAG) % STAGES);
  }
}

// One warp's positions and sub-rows of a stage, in registers.
struct Places {
  u32 positions[BK / 64];
  u32 subs;  // bit 2u + i: unit u, row g + 8i
};

__device__ inline Places places_of(const Part& part, const Extent& extent, i32 tile, i32 lane, i32 stage) {
  Places out;
  const i32 words = extent.columns / 64;
  const u32* meta = reinterpret_cast<const u32*>(part.meta);
#pragma unroll
  for (i32 q = 0; q < BK / 64; ++q) {
    const i32 wanted = stage * (BK / 64) + q, word = wanted < words ? wanted : words - 1;
    out.positions[q] = meta[(static_cast<u64>(tile) * words + word) * 32 + lane];
  }
  out.subs = 0;
  if constexpr (SETS > 1) {
#pragma unroll
    for (i32 unit = 0; unit < UNITS; ++unit) {
      const i32 wanted = stage * BK + unit * UNIT * STEP, last = extent.columns - 1;
      const u64 segment = (wanted < last ? wanted : last) / extent.v;
      const u8* sub = part.sub + segment * extent.sub_pitch + tile * TILE + lane / 4;
      out.subs |= (sub[0] & 1u) << (2 * unit) | (sub[8] & 1u) << (2 * unit + 1);
    }
  }
  return out;
}

struct Sums {
  float at[SETS][64];
};

template <i32 STEPS, i32 S = 0>
__device__ inline void multiply_steps(float (&d)[64], u64 a, u64 b, const Places& places, i32 first, bool fresh) {
  // 16 values are 32 bytes further on in a row of values, 32 columns 64 bytes in a row of x.
  const i32 step = first + S;
  const u64 b_step = b + (step >> 1) * (PANEL_BYTES >> 4) + (step & 1) * 4;
  const i32 add = !(fresh && S == 0);
  if (step & 1) {
    ptx::wgmma_sp<1>(d, a + step * 2, b_step, places.positions[step >> 1], add);
  } else {
    ptx::wgmma_sp<0>(d, a + step * 2, b_step, places.positions[step >> 1], add);
  }
  if constexpr (S + 1 < STEPS) multiply_steps<STEPS, S + 1>(d, a, b, places, first, fresh);
}

// Adds a unit to the set that its rows' sub-rows name.
__device__ inline void add_unit(Sums& sums, const float (&unit)[64], u32 subs) {
#pragma unroll
  for (i32 i = 0; i < 64; ++i) {
    if ((subs >> (i >> 1 & 1)) & 1u) {
      sums.at[SETS - 1][i] += unit[i];
    } else {
      sums.at[0][i] += unit[i];
    }
  }
}

// One stage from shared memory; all of its products have ended when this returns.
__device__ inline void multiply_stage(Sums& sums, float (&unit)[64], u64 a, u64 b, const Places& places, bool first) {
  if constexpr (SETS == 1) {
    ptx::pin(sums.at[0]);
    ptx::begin_products();
    multiply_steps<BK / STEP>(sums.at[0], a, b, places, 0, first);
    ptx::commit_products();
    ptx::wait_products<0>();
    ptx::pin(sums.at[0]);
  } else {
#pragma unroll
    for (i32 u = 0; u < UNITS; ++u) {
      ptx::pin(unit);
      ptx::begin_products();
      multiply_steps<UNIT>(unit, a, b, places, u * UNIT, true);
      ptx::commit_products();
      ptx::wait_products<0>();
      ptx::pin(unit);
      add_unit(sums, unit, places.subs >> (2 * u));
    }
  }
}

__device__ inline void multiply(Sums& sums, const Job& job, const Part& part, const Stages& stages, i32 group,
                                i32 thread) {
  const i32 count = stages_of(job.extent), lane = thread % 32;
  const i32 wanted = first_tile(job.row_block, group) + thread / 32;
  const i32 tile = wanted < job.extent.row_tiles ? wanted : job.extent.row_tiles - 1;
  Places now = places_of(part, job.extent, tile, lane, 0);
  float unit[64] = {};
  for (i32 s = 0; s < count; ++s) {
    const Places next = places_of(part, job.extent, tile, lane, s + 1 < count ? s + 1 : s);
    const u8* stage = stages.memory + s % STAGES * STAGE_BYTES;
    ptx::wait_phase(stages.full + s % STAGES, (s / STAGES) & 1);
    multiply_stage(sums, unit, operand(stage + group * TILE_BYTES), operand(stage + VALUE_BYTES), now, s == 0);
    if (lane == 0) ptx::arrive(stages.empty + s % STAGES);
    now = next;
  }
}

// Features of compressed row r are SETS r ... SETS r + SETS - 1.
__device__ inline i32 feature_of(const Job& job, i32 group, i32 thread, i32 i) {
  return SETS * ((first_tile(job.row_block, group) + thread / 32) * TILE + thread % 32 / 4 + (i >> 1 & 1) * 8);
}

__device__ inline i32 slot_of(i32 thread, i32 i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

__device__ inline void store_plain(const Sums& sums, const Job& job, float* y, i32 group, i32 thread) {
#pragma unroll
  for (i32 i = 0; i < 64; ++i) {
    const i32 slot = slot_of(thread, i), feature = feature_of(job, group, thread, i);
    if (slot >= job.pairs || feature >= job.extent.out_rows) continue;
    float* at = y + static_cast<u64>(job.first_pair + slot) * job.extent.out_rows + feature;
    at[0] = sums.at[0][i];
    if (SETS == 2) at[1] = sums.at[SETS - 1][i];
  }
}

// `ups`: [SETS][64][threads of a warpgroup], the other warpgroup's sums, each thread's at its own place.
__device__ inline void store_gated(const Sums& sums, const float* ups, const Job& job, u16* h, i32 thread,
                                   const gate::Form& form) {
#pragma unroll
  for (i32 i = 0; i < 64; ++i) {
    const i32 slot = slot_of(thread, i), feature = feature_of(job, 0, thread, i);
    if (slot >= job.pairs || feature >= job.extent.out_rows) continue;
    float out[2] = {};
    for (i32 set = 0; set < SETS; ++set) {
      out[set] = gate::apply<GANGLINE_ACTIVATION>(form, sums.at[set][i], ups[(set * 64 + i) * GROUP + thread]);
    }
    u16* at = h + static_cast<u64>(job.first_pair + slot) * job.extent.out_rows + feature;
    const u32 both = ptx::to_bf16x2(out[0], out[1]);
    if (SETS == 2) {
      *reinterpret_cast<u32*>(at) = both;
    } else {
      *at = static_cast<u16>(both);
    }
  }
}

// Both multiplying warpgroups: up hands its sums to gate through shared memory that nothing is copied to any more.
__device__ inline void finish_gated(const Sums& sums, const Job& job, u8* memory, u16* h, i32 group, i32 thread,
                                    const gate::Form& form) {
  float* ups = reinterpret_cast<float*>(memory);
  ptx::sync_some<1>(2 * GROUP);
  if (group == 1) {
#pragma unroll
    for (i32 i = 0; i < SETS * 64; ++i) ups[i * GROUP + thread] = sums.at[i / 64][i % 64];
  }
  ptx::sync_some<1>(2 * GROUP);
  if (group == 0) store_gated(sums, ups, job, h, thread, form);
}

__device__ inline void consume(const Job& job, const Part& part, const Stages& stages, void* out, i32 group,
                               i32 thread, const gate::Form& form) {
  Sums sums = {};
  multiply(sums, job, part, stages, group, thread);
  if (GATED) {
    finish_gated(sums, job, stages.memory, static_cast<u16*>(out), group, thread, form);
  } else {
    store_plain(sums, job, static_cast<float*>(out), group, thread);
  }
}

}  // namespace wide

// maps: [experts][2], the values of every part. The others: see ssmm.cu.
extern "C" __global__ void __launch_bounds__(wide::THREADS, 1)
    gangline_wgmma(const ptx::TensorMap* maps, const wide::Part* parts, const i32* starts, const i32* tiles,
                   const i32* rows, const u16* x, void* out, i32 experts, i32 columns, i32 x_columns, i32 sub_pitch,
                   i32 row_tiles, i32 out_rows, i32 v, float alpha, float limit, i32 late) {
  GANGLINE_SHARED(memory);
  if (ptx::block_y() >= tiles[experts]) return;
  const i32 expert = wide::expert_of(tiles, experts, ptx::block_y());
  const i32 first_pair = starts[expert] + (ptx::block_y() - tiles[expert]) * wide::TOKENS;
  const wide::Job job{{columns, x_columns, sub_pitch, row_tiles, out_rows, v}, first_pair,
                      starts[expert + 1] - first_pair, ptx::block_x()};

  i32* slots = reinterpret_cast<i32*>(memory + wide::STAGES * wide::STAGE_BYTES);
  u64* full = reinterpret_cast<u64*>(slots + wide::TOKENS);
  const wide::Stages stages{memory, full, full + wide::STAGES};
  if (ptx::thread() < wide::TOKENS) {
    const i32 slot = ptx::thread();
    slots[slot] = slot >= job.pairs ? -1 : rows == nullptr ? first_pair + slot : rows[first_pair + slot];
  }
  if (ptx::thread() == 0) {
    for (i32 s = 0; s < wide::STAGES; ++s) {
      ptx::init_barrier(stages.full + s, wide::GROUP + 1);
      ptx::init_barrier(stages.empty + s, 2 * wide::GROUP / 32);
    }
    ptx::publish_barriers();
  }
  ptx::sync_block();

  const i32 group = ptx::thread() / wide::GROUP, thread = ptx::thread() % wide::GROUP;
  if (group == 2) {
    ptx::fewer_registers<40>();
    wide::bring(job, maps + 2 * expert, x, slots, stages, thread);
  } else {
    ptx::more_registers<232>();
    wide::consume(job, parts[2 * expert + (wide::GATED ? group : 0)], stages, out, group, thread,
                  gate::Form{alpha, limit, late});
  }
}
