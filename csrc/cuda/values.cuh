// How the kept values of a matrix become A fragments of mma.sp.m16n8k32, for each kind of stored value.
//
// Fragment of lane L (g = L / 4, t = L % 4) over 16 compressed columns: register 0 is row g, columns 2t and 2t + 1;
// register 1 the same of row g + 8; registers 2 and 3 the same eight columns further.
#pragma once

#include <ptx.cuh>

namespace values {

constexpr i32 PAD = 16;  // bytes between rows in shared memory: eight rows then start in different banks

struct Bf16 {
  static constexpr i32 BITS = 16;
  static constexpr bool CODES = false;

  // `tile`: 16 rows in shared memory, `pitch` bytes apart; `step`: which 16 compressed columns.
  template <i32 PITCH>
  static __device__ inline void fragment(u32 (&a)[4], const u8* tile, i32 lane, i32 step) {
    // Matrices in register order: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
    const i32 row = (lane & 7) + (lane & 8);
    ptx::load_matrices(a, tile + row * PITCH + step * 32 + (lane >> 4) * 16);
  }
};

struct Int8 {
  static constexpr i32 BITS = 8;
  static constexpr bool CODES = true;

  // Codes n, two of them, as exact bf16 numbers n - 128: 2^23 + n is an fp32 number, and so is what is left.
  static __device__ inline u32 two(u32 pair) {
    const u32 magic = 0x4B000000u;
    const float first = ptx::as_float(ptx::permute_bytes<0x7650>(pair, magic)) - 8388736.0f;
    const float second = ptx::as_float(ptx::permute_bytes<0x7651>(pair, magic)) - 8388736.0f;
    return ptx::permute_bytes<0x7632>(ptx::as_bits(first), ptx::as_bits(second));
  }

  template <i32 PITCH>
  static __device__ inline void fragment(u32 (&a)[4], const u8* tile, i32 lane, i32 step) {
    const u8* at = tile + (lane >> 2) * PITCH + step * 16 + (lane & 3) * 2;
    for (i32 part = 0; part < 4; ++part) {
      a[part] = two(*reinterpret_cast<const u16*>(at + (part & 1) * 8 * PITCH + (part >> 1) * 8));
    }
  }
};

struct Int4 {
  static constexpr i32 BITS = 4;
  static constexpr bool CODES = true;

  // Codes n (low nibble first) as exact bf16 numbers n - 8: 128 + n is a bf16 number whose last bits are n.
  static __device__ inline u32 two(u32 byte) {
    const u32 apart = (byte & 0x0Fu) | ((byte & 0xF0u) << 12);
    return ptx::fma_bf16x2(apart | 0x43004300u, 0x3F803F80u, 0xC308C308u);
  }

  template <i32 PITCH>
  static __device__ inline void fragment(u32 (&a)[4], const u8* tile, i32 lane, i32 step) {
    const u8* at = tile + (lane >> 2) * PITCH + step * 8;
    for (i32 half = 0; half < 2; ++half) {
      const u64 row = *reinterpret_cast<const u64*>(at + half * 8 * PITCH);
      const u32 shift = (lane & 3) * 8;
      a[half] = two((static_cast<u32>(row) >> shift) & 0xFFu);
      a[2 + half] = two((static_cast<u32>(row >> 32) >> shift) & 0xFFu);
    }
  }
};

}  // namespace values
