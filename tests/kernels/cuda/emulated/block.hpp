// What fibers.cpp and warpgroups.cpp share: the state of the block that runs.
#pragma once

#include <ucontext.h>

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "fibers.hpp"

namespace emulated {

constexpr int ALIGN = 1024;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool real;
  int group;
};

struct Fiber {
  Place place{};
  ucontext_t context{};
  std::vector<char> stack;
  int group = 0;
  bool done = false;
  std::deque<Copy> copies;
  std::vector<std::size_t> unpublished;
};

struct Meeting {
  int here = 0, generation = 0, kind = -1;
  std::vector<unsigned char> in, out;
};

struct Range {
  const unsigned char* start;
  std::size_t bytes;
};

// A barrier that lies in shared memory.
struct Gate {
  int count = 0, waiting = 0, bytes = 0, parity = 0;
};

struct Tile {
  unsigned char* to;
  TileMap map;
  int column, row;
  void* barrier;
};

constexpr int GROUP = 128;

struct Product {
  float* d[GROUP];
  unsigned positions[GROUP];
  unsigned long long a[GROUP], b[GROUP];
  int selector, number;
  bool add;
};

struct Warpgroup {
  Meeting meeting;
  Product next{};
  std::deque<Product> products;
  int number = 0;
  bool begun = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Range> readable;
  std::vector<Warpgroup> groups;
  std::map<int, Meeting> some;
  std::map<void*, Gate> gates;
  std::deque<Tile> tiles;
  std::vector<char> unpublished;  // of every 16 bytes of shared memory
  ucontext_t scheduler{};
  Fiber* current = nullptr;
  bool late = true;
  std::string failure;
  Start start = nullptr;
  void** args = nullptr;
};

extern Block block;

void yield();
// Whether this fiber was the last to come; the others return once it has called `leave`.
bool arrive_last(Meeting& meeting, int count);
void leave(Meeting& meeting);

}  // namespace emulated
