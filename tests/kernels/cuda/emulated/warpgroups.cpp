// Hopper: barriers that count bytes, tiles, and products of a warpgroup, from the PTX ISA.
#include <algorithm>
#include <cstdint>

#include "block.hpp"

namespace emulated {

void sync_some(int number, int threads) {
  Meeting& meeting = block.some[number];
  if (arrive_last(meeting, threads)) leave(meeting);
}

unsigned shared_offset(const void* at) { return static_cast<const unsigned char*>(at) - block.shared; }

void init_barrier(void* barrier, int count) {
  check_shared(barrier, 8);
  block.gates[barrier] = Gate{count, count, 0, 0};
}

namespace {

Gate& gate(void* barrier) {
  const auto found = block.gates.find(barrier);
  require(found != block.gates.end(), "a barrier that was not initialised");
  return found->second;
}

void end_phase(Gate& gate) {
  if (gate.waiting != 0 || gate.bytes != 0) return;
  gate.waiting = gate.count;
  gate.parity ^= 1;
}

void arrive(const Tile& tile) {
  const int row_bytes = static_cast<int>(tile.map.box_columns) * 2, rows = static_cast<int>(tile.map.box_rows);
  for (int row = 0; row < rows; ++row) {
    for (int at = 0; at < row_bytes; at += 2) {
      const std::uint64_t x = tile.column + at / 2, y = tile.row + row;
      std::uint16_t value = 0;
      if (x < tile.map.columns && y < tile.map.rows) {
        std::memcpy(&value, reinterpret_cast<const void*>(tile.map.base + y * tile.map.pitch + 2 * x), 2);
      }
      const int place = row * 128 + at;
      std::memcpy(tile.to + (place ^ ((place >> 3) & 0x70)), &value, 2);
    }
  }
  Gate& counted = gate(tile.barrier);
  counted.bytes -= row_bytes * rows;
  end_phase(counted);
}

// The bf16 number at a byte of a row of an operand of wgmma: 128 bytes a row, swizzled.
float operand_at(unsigned long long descriptor, int row, int byte) {
  require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "an operand without the swizzle of 128 bytes");
  const std::size_t start = (descriptor & 0x3FFF) * 16, stride = (descriptor >> 32 & 0x3FFF) * 16;
  std::size_t place = start + row / 8 * stride + row % 8 * 128 + byte;
  place ^= place >> 3 & 0x70;
  require(place + 2 <= block.shared_bytes, "an operand outside shared memory");
  require(!block.unpublished[place / 16], "an operand that was not published");
  std::uint16_t bits;
  std::memcpy(&bits, block.shared + place, 2);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

// m64n128k32, bf16: a is 2:4 sparse. Layouts from the PTX ISA.
void multiply(const Product& product) {
  static float dense[64][32], x[128][32];
  for (int row = 0; row < 64; ++row) {
    std::fill(dense[row], dense[row] + 32, 0.0f);
    for (int kept = 0; kept < 16; ++kept) {
      const int group = kept / 2, thread = row / 16 * 32 + row % 8 * 4 + product.selector * 2 + group / 4;
      const unsigned nibble = product.positions[thread] >> (row % 16 / 8 * 16 + group % 4 * 4) & 15u;
      require((nibble & 3u) < (nibble >> 2), "positions of a group do not increase");
      dense[row][group * 4 + (nibble >> kept % 2 * 2 & 3u)] = operand_at(product.a[0], row, kept * 2);
    }
  }
  for (int slot = 0; slot < 128; ++slot) {
    for (int k = 0; k < 32; ++k) x[slot][k] = operand_at(product.b[0], slot, k * 2);
  }
  for (int thread = 0; thread < GROUP; ++thread) {
    for (int i = 0; i < 64; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, slot = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double sum = product.add ? product.d[thread][i] : 0.0;
      for (int k = 0; k < 32; ++k) {
        if (dense[row][k] != 0) sum += double(dense[row][k]) * double(x[slot][k]);
      }
      product.d[thread][i] = static_cast<float>(sum);
    }
  }
}

Warpgroup& warpgroup() { return block.groups[self().thread / GROUP]; }

// Whether this thread is the last of its warpgroup at an instruction.
bool last_of_group(Warpgroup& group, int kind) {
  if (group.meeting.here == 0) group.meeting.kind = kind;
  require(group.meeting.kind == kind, "warps of a warpgroup are at different instructions");
  return arrive_last(group.meeting, GROUP);
}

}  // namespace

void arrive(void* barrier, int expected_bytes) {
  Gate& counted = gate(barrier);
  require(counted.waiting > 0, "too many arrivals at a barrier");
  counted.bytes += expected_bytes;
  --counted.waiting;
  end_phase(counted);
}

void wait_phase(void* barrier, int parity) {
  for (int turns = 0; gate(barrier).parity == parity; ++turns) {
    require(turns < 100000, "a barrier whose phase never ends");
    const auto found =
        std::find_if(block.tiles.begin(), block.tiles.end(), [barrier](const Tile& tile) { return tile.barrier == barrier; });
    if (found == block.tiles.end()) {
      yield();
      continue;
    }
    const Tile tile = *found;
    block.tiles.erase(found);
    arrive(tile);
  }
}

void publish_writes() {
  for (const std::size_t chunk : block.current->unpublished) block.unpublished[chunk] = 0;
  block.current->unpublished.clear();
}

void load_tile(void* to, const TileMap* map, int column, int row, void* barrier) {
  require(map->kind == TILE_MAP, "an address that is no tensor map");
  require(shared_offset(to) % ALIGN == 0 && map->box_columns == 64, "a tile that does not fit the swizzle");
  const Tile tile{static_cast<unsigned char*>(to), *map, column, row, barrier};
  if (block.late) {
    block.tiles.push_back(tile);
  } else {
    arrive(tile);
  }
}

void begin_products() {
  Warpgroup& group = warpgroup();
  if (!last_of_group(group, 0)) return;
  group.begun = true;
  leave(group.meeting);
}

void product(float* d, unsigned long long a, unsigned long long b, unsigned positions, int selector, bool add) {
  Warpgroup& group = warpgroup();
  const int thread = self().thread % GROUP;
  require(group.begun, "a product without a fence before it");
  group.next.d[thread] = d;
  group.next.a[thread] = a;
  group.next.b[thread] = b;
  group.next.positions[thread] = positions;
  if (!last_of_group(group, 1 + selector)) return;
  Product& next = group.next;
  next.selector = selector;
  next.add = add;
  next.number = group.number;
  require(std::all_of(next.a, next.a + GROUP, [&next](auto one) { return one == next.a[0]; }) &&
              std::all_of(next.b, next.b + GROUP, [&next](auto one) { return one == next.b[0]; }),
          "threads of a warpgroup name different operands");
  if (block.late) {
    group.products.push_back(next);
  } else {
    multiply(next);
  }
  leave(group.meeting);
}

void commit_products() {
  Warpgroup& group = warpgroup();
  if (!last_of_group(group, 3)) return;
  ++group.number;
  leave(group.meeting);
}

void wait_products(int left) {
  Warpgroup& group = warpgroup();
  if (!last_of_group(group, 4)) return;
  auto& products = group.products;
  for (; !products.empty() && products.front().number < group.number - left; products.pop_front()) {
    multiply(products.front());
  }
  group.begun = false;
  leave(group.meeting);
}

}  // namespace emulated
