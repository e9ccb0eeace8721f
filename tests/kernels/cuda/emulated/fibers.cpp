#include <algorithm>
#include <cstdint>
#include <random>

#include "block.hpp"

namespace emulated {

Block block;

void yield() { swapcontext(&block.current->context, &block.scheduler); }

bool arrive_last(Meeting& meeting, int count) {
  if (++meeting.here == count) return true;
  for (const int generation = meeting.generation; generation == meeting.generation;) yield();
  return false;
}

void leave(Meeting& meeting) {
  meeting.here = 0;
  ++meeting.generation;
}

namespace {

void arrive(const Copy& copy) {
  if (copy.real) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
  const std::size_t chunk = (copy.to - block.shared) / 16;
  block.unpublished[chunk] = 1;
  block.current->unpublished.push_back(chunk);
}

void enter() {
  block.start(block.args);
  block.current->done = true;
  yield();
}

void prepare(int x, int y, int count, std::size_t shared_bytes) {
  block.fibers.clear();
  block.fibers.resize(count);
  block.warps.assign((count + 31) / 32, {});
  block.all = {};
  block.groups.assign((count + GROUP - 1) / GROUP, {});
  block.some.clear();
  block.gates.clear();
  block.tiles.clear();
  block.unpublished.assign(shared_bytes / 16 + 1, 0);
  block.memory.assign(shared_bytes + ALIGN, 0xFF);
  block.shared = block.memory.data() + (ALIGN - reinterpret_cast<std::uintptr_t>(block.memory.data()) % ALIGN);
  block.shared_bytes = shared_bytes;
  for (int thread = 0; thread < count; ++thread) {
    Fiber& fiber = block.fibers[thread];
    fiber.place = {thread, x, y};
    fiber.stack.resize(64 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

void run_block(std::mt19937& random) {
  std::vector<Fiber*> order;
  for (Fiber& fiber : block.fibers) order.push_back(&fiber);
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), random);
    for (Fiber* fiber : order) {
      block.current = fiber;
      swapcontext(&block.scheduler, &fiber->context);
      if (!block.failure.empty()) return;
    }
    std::erase_if(order, [](const Fiber* fiber) { return fiber->done; });
  }
}

}  // namespace

const Place& self() { return block.current->place; }
int threads() { return static_cast<int>(block.fibers.size()); }
unsigned char* shared() { return block.shared; }

// A fiber that fails never goes on: the scheduler sees the failure and ends the run.
void require(bool holds, const char* what) {
  if (holds) return;
  block.failure = what;
  yield();
}

void check_shared(const void* at, std::size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(at);
  require(byte >= block.shared && byte + bytes <= block.shared + block.shared_bytes, "an address outside shared memory");
  require(reinterpret_cast<std::uintptr_t>(byte) % bytes == 0, "an unaligned shared address");
}

void barrier() {
  if (arrive_last(block.all, threads())) leave(block.all);
}

const void* meet_warp(int kind, const void* mine, std::size_t in_bytes, std::size_t out_bytes, All all) {
  const int thread = self().thread, lane = thread % 32;
  Meeting& meeting = block.warps[thread / 32];
  if (meeting.here == 0) meeting.kind = kind;
  require(meeting.kind == kind, "lanes of a warp are at different instructions");
  meeting.in.resize(std::max(meeting.in.size(), 32 * in_bytes));
  meeting.out.resize(std::max(meeting.out.size(), 32 * out_bytes));
  std::memcpy(meeting.in.data() + lane * in_bytes, mine, in_bytes);
  if (arrive_last(meeting, 32)) {
    all(meeting.in.data(), meeting.out.data());
    leave(meeting);
  }
  return meeting.out.data() + lane * out_bytes;
}

void copy(void* to, const void* from, bool real) {
  check_shared(to, 16);
  const auto* source = static_cast<const unsigned char*>(from);
  require(reinterpret_cast<std::uintptr_t>(source) % 16 == 0, "an unaligned global address");
  const bool inside = std::any_of(block.readable.begin(), block.readable.end(), [source](const Range& range) {
    return source >= range.start && source + 16 <= range.start + range.bytes;
  });
  require(inside || !real, "a copy from outside the tensors");
  const Copy one{static_cast<unsigned char*>(to), source, real, block.current->group};
  if (block.late) {
    block.current->copies.push_back(one);
  } else {
    arrive(one);
  }
}

void commit() { ++block.current->group; }

void wait(int left) {
  auto& copies = block.current->copies;
  for (; !copies.empty() && copies.front().group < block.current->group - left; copies.pop_front()) {
    arrive(copies.front());
  }
}

const char* run(Start start, int grid_x, int grid_y, int threads, std::size_t shared_bytes, bool late, unsigned seed,
                void** args, const void* const* starts, const std::size_t* bytes, int ranges) {
  block.readable.clear();
  for (int i = 0; i < ranges; ++i) {
    block.readable.push_back({static_cast<const unsigned char*>(starts[i]), bytes[i]});
  }
  block.late = late;
  block.failure.clear();
  block.start = start;
  block.args = args;
  std::mt19937 random(seed);
  for (int y = 0; y < grid_y; ++y) {
    for (int x = 0; x < grid_x; ++x) {
      prepare(x, y, threads, shared_bytes);
      run_block(random);
      if (!block.failure.empty()) return block.failure.c_str();
    }
  }
  return nullptr;
}

}  // namespace emulated
