// Device instructions that C++ has no words for, one function each. Nothing else in csrc/cuda contains assembly or
// names of CUDA's built-in variables, so that a header of the same functions can stand in for this one on a CPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

#define GANGLINE_SHARED(name) extern __shared__ __align__(1024) u8 name[]

namespace ptx {

__device__ inline i32 thread() { return static_cast<i32>(threadIdx.x); }
__device__ inline i32 block_x() { return static_cast<i32>(blockIdx.x); }
__device__ inline i32 block_y() { return static_cast<i32>(blockIdx.y); }
__device__ inline i32 block_threads() { return static_cast<i32>(blockDim.x); }
__device__ inline void sync_block() { __syncthreads(); }

__device__ inline u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory, or zeros; arrives when wait() has covered its group.
__device__ inline void copy16(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most LEFT of this thread's groups are on their way.
template <int LEFT>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of 16-bit numbers: lane L gives the address of row L % 8 of matrix L / 8, and receives of every
// matrix the numbers 2 (L % 4) and 2 (L % 4) + 1 of row L / 4.
__device__ inline void load_matrices(u32 (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8) += a (16x32, 2:4 sparse, bf16) b (32x8, bf16). SELECTOR names the two lanes of every four that hold
// the positions.
template <int SELECTOR>
__device__ inline void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 positions) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions),
        "n"(SELECTOR));
}

__device__ inline float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ inline u32 as_bits(float number) { return __float_as_uint(number); }

// Two bf16 numbers, the first in the low half; rounded to nearest even.
__device__ inline u32 to_bf16x2(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
// a b + c in both halves.
__device__ inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
// The byte SELECT[i] of the eight bytes (high, low) for every byte i.
template <u32 SELECT>
__device__ inline u32 permute_bytes(u32 low, u32 high) {
  return __byte_perm(low, high, SELECT);
}
__device__ inline float half_to_float(u16 bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}
// Four numbers at an address that is a multiple of 16.
__device__ inline void load4(float (&out)[4], const float* from) {
  const float4 found = *reinterpret_cast<const float4*>(from);
  out[0] = found.x;
  out[1] = found.y;
  out[2] = found.z;
  out[3] = found.w;
}
// Without contraction to a fused multiply-add: the roundings are those of the reference.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }

}  // namespace ptx
