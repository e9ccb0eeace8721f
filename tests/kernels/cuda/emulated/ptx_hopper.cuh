// Stands in for csrc/cuda/ptx_hopper.cuh on a CPU; see ptx.cuh beside it.
#pragma once

#include <ptx.cuh>

namespace ptx {

inline void init_barrier(u64* barrier, u32 count) { emulated::init_barrier(barrier, static_cast<int>(count)); }
inline void publish_barriers() {}
inline void arrive(u64* barrier) { emulated::arrive(barrier, 0); }
inline void arrive_expecting(u64* barrier, u32 bytes) { emulated::arrive(barrier, static_cast<int>(bytes)); }
inline void wait_phase(u64* barrier, u32 parity) { emulated::wait_phase(barrier, static_cast<int>(parity)); }
inline void publish_writes() { emulated::publish_writes(); }

struct alignas(64) TensorMap {
  u64 opaque[16];
};
inline void acquire_map(const TensorMap*) {}
inline void load_tile(void* to, const TensorMap* map, i32 column, i32 row, u64* barrier) {
  emulated::load_tile(to, reinterpret_cast<const emulated::TileMap*>(map), column, row, barrier);
}

template <u32 COUNT>
inline void fewer_registers() {}
template <u32 COUNT>
inline void more_registers() {}
template <u32 NUMBER>
inline void sync_some(u32 threads) {
  emulated::sync_some(NUMBER, static_cast<int>(threads));
}

inline void begin_products() { emulated::begin_products(); }
inline void commit_products() { emulated::commit_products(); }
template <i32 LEFT>
inline void wait_products() {
  emulated::wait_products(LEFT);
}
inline void pin(float (&)[64]) {}
template <i32 SELECTOR>
inline void wgmma_sp(float (&d)[64], u64 a, u64 b, u32 positions, i32 add) {
  emulated::product(d, a, b, positions, SELECTOR, add != 0);
}

}  // namespace ptx
