// Stands in for csrc/cuda/ptx.cuh on a CPU: the same functions, executed by fibers, one a CUDA thread. The kernels'
// sources are compiled as they are; only the instructions are emulated, by what the PTX ISA says about their fragments.
#pragma once

#include <math.h>

#include <cstring>

#include "fibers.hpp"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

#define __device__
#define __global__
#define __launch_bounds__(...)
#define GANGLINE_SHARED(name) u8* name = emulated::shared()

namespace ptx {

inline float as_float(u32 bits) {
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline u32 as_bits(float number) {
  u32 out;
  std::memcpy(&out, &number, 4);
  return out;
}
inline float from_bf16(u32 bits) { return as_float(bits << 16); }
inline u32 to_bf16(float number) {
  const u32 bits = as_bits(number);
  if (number != number) return 0x7FC0u;
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

inline i32 thread() { return emulated::self().thread; }
inline i32 block_x() { return emulated::self().block_x; }
inline i32 block_y() { return emulated::self().block_y; }
inline i32 block_threads() { return emulated::threads(); }
inline void sync_block() { emulated::barrier(); }

inline u32 shared_address(const void* pointer) { return emulated::shared_offset(pointer); }

inline void copy16(void* to, const void* from, bool real) { emulated::copy(to, from, real); }
inline void commit() { emulated::commit(); }
template <int LEFT>
inline void wait() {
  emulated::wait(LEFT);
}

inline void load_matrices(u32 (&out)[4], const void* row) {
  emulated::check_shared(row, 16);
  struct In {
    const u8* row;
  };
  struct Out {
    u32 at[4];
  };
  const auto all = [](const void* operands, void* results) {
    const In* in = static_cast<const In*>(operands);
    Out* result = static_cast<Out*>(results);
    for (i32 lane = 0; lane < 32; ++lane) {
      for (i32 matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&result[lane].at[matrix], in[matrix * 8 + lane / 4].row + lane % 4 * 4, 4);
      }
    }
  };
  const Out mine = emulated::warp<In, Out>(1, In{static_cast<const u8*>(row)}, all);
  std::memcpy(out, mine.at, 16);
}

struct MmaIn {
  u32 a[4], b[4], positions;
  float d[4];
};
struct MmaOut {
  float d[4];
};

// m16n8k32, bf16, one operand 2:4 sparse, from PTX ISA "Matrix fragments for sparse mma.m16n8k32".
template <int SELECTOR>
inline void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 positions) {
  MmaIn in;
  std::memcpy(in.a, a, 16);
  std::memcpy(in.b, b, 16);
  std::memcpy(in.d, d, 16);
  in.positions = positions;
  const auto all = [](const void* operands, void* results) {
    const MmaIn* of = static_cast<const MmaIn*>(operands);
    MmaOut* result = static_cast<MmaOut*>(results);
    float dense[16][32] = {}, x[32][8];
    for (i32 row = 0; row < 16; ++row) {
      for (i32 kept = 0; kept < 16; ++kept) {
        const u32 pair = of[row % 8 * 4 + kept % 8 / 2].a[row / 8 + kept / 8 * 2];
        const i32 group = kept / 2;
        // Lanes SELECTOR * 2 and + 1 of every four: columns 0-15 and 16-31; row r in the low half, r + 8 in the high.
        const u32 word = of[row % 8 * 4 + SELECTOR * 2 + group / 4].positions >> (row / 8 * 16);
        const u32 nibble = (word >> (group % 4 * 4)) & 15u;
        emulated::require((nibble & 3u) < (nibble >> 2), "positions of a group do not increase");
        dense[row][group * 4 + ((nibble >> (kept % 2 * 2)) & 3u)] = from_bf16((pair >> (kept % 2 * 16)) & 0xFFFFu);
      }
    }
    for (i32 row = 0; row < 32; ++row) {
      for (i32 column = 0; column < 8; ++column) {
        x[row][column] = from_bf16((of[column * 4 + row % 8 / 2].b[row / 8] >> (row % 2 * 16)) & 0xFFFFu);
      }
    }
    for (i32 lane = 0; lane < 32; ++lane) {
      for (i32 c = 0; c < 4; ++c) {
        const i32 row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        double sum = of[lane].d[c];
        for (i32 k = 0; k < 32; ++k) {
          if (dense[row][k] != 0) sum += double(dense[row][k]) * double(x[k][column]);
        }
        result[lane].d[c] = static_cast<float>(sum);
      }
    }
  };
  const MmaOut mine = emulated::warp<MmaIn, MmaOut>(2 + SELECTOR, in, all);
  std::memcpy(d, mine.d, 16);
}

inline u32 to_bf16x2(float low, float high) { return to_bf16(low) | (to_bf16(high) << 16); }
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (i32 half = 0; half < 32; half += 16) {
    const auto part = [half](u32 bits) { return double(from_bf16((bits >> half) & 0xFFFFu)); };
    out |= to_bf16(static_cast<float>(part(a) * part(b) + part(c))) << half;
  }
  return out;
}
template <u32 SELECT>
inline u32 permute_bytes(u32 low, u32 high) {
  const u64 bytes = (static_cast<u64>(high) << 32) | low;
  u32 out = 0;
  for (i32 i = 0; i < 4; ++i) out |= static_cast<u32>((bytes >> (8 * ((SELECT >> (4 * i)) & 7u))) & 0xFFu) << (8 * i);
  return out;
}
inline float half_to_float(u16 bits) {
  const float magnitude = (bits & 0x7C00u) == 0 ? ldexpf(float(bits & 0x3FFu), -24)
                                                : ldexpf(float((bits & 0x3FFu) | 0x400u), ((bits >> 10) & 31) - 25);
  return bits & 0x8000u ? -magnitude : magnitude;
}
inline void load4(float (&out)[4], const float* from) {
  emulated::require(reinterpret_cast<u64>(from) % 16 == 0, "an unaligned global address");
  std::memcpy(out, from, 16);
}
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }

}  // namespace ptx
