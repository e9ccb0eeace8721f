// One fiber for every CUDA thread of a block, in random order; warps and barriers as places where fibers meet.
//
// Copies to shared memory arrive as late as the waits allow, or at once: a kernel must be right with both. Shared
// memory starts as NaN. A copy from outside the tensors that the caller named, or to outside shared memory, ends the run.
#pragma once

#include <cstddef>
#include <cstring>

namespace emulated {

struct Place {
  int thread, block_x, block_y;
};

const Place& self();
int threads();
unsigned char* shared();
void require(bool holds, const char* what);
void check_shared(const void* at, std::size_t bytes);
void barrier();
void copy(void* to, const void* from, bool real);
void commit();
void wait(int left);
void sync_some(int number, int threads);
unsigned shared_offset(const void* at);

// Hopper: barriers that count bytes, tiles, and products of a warpgroup that run when they are waited for, or at once.
// Copies that their thread has not published are nothing that a product may read.
void init_barrier(void* barrier, int count);
void arrive(void* barrier, int expected_bytes);
void wait_phase(void* barrier, int parity);
void publish_writes();

struct TileMap {  // what a tensor map says; the launcher of the tests writes it
  unsigned long long base, columns, rows, pitch, box_columns, box_rows, kind;
};
constexpr unsigned long long TILE_MAP = 0x70616D656C6974;
void load_tile(void* to, const TileMap* map, int column, int row, void* barrier);

void begin_products();
void product(float* d, unsigned long long a, unsigned long long b, unsigned positions, int selector, bool add);
void commit_products();
void wait_products(int left);

// Operands and results of the 32 lanes of a warp's instruction: `all` turns the ones into the others when the last lane
// has come, and this lane's result is the return value.
using All = void (*)(const void* in, void* out);
const void* meet_warp(int kind, const void* mine, std::size_t in_bytes, std::size_t out_bytes, All all);

template <class In, class Out>
Out warp(int kind, const In& mine, All all) {
  Out result;
  std::memcpy(&result, meet_warp(kind, &mine, sizeof(In), sizeof(Out), all), sizeof(Out));
  return result;
}

// Starts the kernel with the arguments at these addresses.
using Start = void (*)(void** args);
const char* run(Start start, int grid_x, int grid_y, int threads, std::size_t shared_bytes, bool late, unsigned seed,
                void** args, const void* const* starts, const std::size_t* bytes, int ranges);

}  // namespace emulated
