// Sorts the (token, slot) pairs of a few tokens by expert, in one block: what routing.py does in a dozen steps for many.
//
// A pair's place is the number of pairs before it, by expert and then by number: counted by every pair's own thread.
// Ids outside [0, experts) come last. Threads: any number; shared memory: 4 (2 pairs + experts + 1) bytes.
//
//     starts, tiles  [experts + 1]   first pair, and first tile of `tokens` pairs, of each expert
//     token          [pairs]         of each place
//     place, by      [pairs]         a token's places, ascending, and its weights in that order
#include <ptx.cuh>

extern "C" __global__ void gangline_route(const long long* ids, const float* weight, i32* starts, i32* tiles, i32* token,
                                          i32* place, float* by, i32 pairs, i32 slots, i32 experts, i32 tokens) {
  GANGLINE_SHARED(memory);
  i32* key = reinterpret_cast<i32*>(memory);
  i32* places = key + pairs;
  i32* first = places + pairs;
  for (i32 p = ptx::thread(); p < pairs; p += ptx::block_threads()) {
    key[p] = ids[p] >= 0 && ids[p] < experts ? static_cast<i32>(ids[p]) : experts;
  }
  ptx::sync_block();
  for (i32 p = ptx::thread(); p < pairs; p += ptx::block_threads()) {
    i32 before = 0;
    for (i32 q = 0; q < pairs; ++q) before += key[q] < key[p] || (key[q] == key[p] && q < p);
    places[p] = before;
    token[before] = p / slots;
  }
  for (i32 e = ptx::thread(); e <= experts; e += ptx::block_threads()) {
    i32 before = 0;
    for (i32 q = 0; q < pairs; ++q) before += key[q] < e;
    first[e] = before;
    starts[e] = before;
  }
  ptx::sync_block();
  for (i32 e = ptx::thread(); e <= experts; e += ptx::block_threads()) {
    i32 before = 0;
    for (i32 f = 0; f < e; ++f) before += (first[f + 1] - first[f] + tokens - 1) / tokens;
    tiles[e] = before;
  }
  for (i32 p = ptx::thread(); p < pairs; p += ptx::block_threads()) {
    const i32 of_token = p / slots * slots;
    i32 before = 0;
    for (i32 q = of_token; q < of_token + slots; ++q) before += places[q] < places[p];
    place[of_token + before] = places[p];
    by[of_token + before] = weight[p];
  }
}
