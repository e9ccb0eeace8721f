// out[t] = sum over j of weight[t][j] y[pair[t][j]], in fp32 and in the order of j: with pairs sorted by expert, and
// pair[t] ascending, that is ascending expert id. Pairs at or past `pairs` do not count (experts that lie elsewhere).
// Where y comes in `splits` parts (of the columns of its product), they are added first, in their order.
//
// One thread makes four neighbouring columns of one token: grid (tokens, blocks of columns).
#include <parts.cuh>

extern "C" __global__ void gangline_combine(const float* y, const i32* pair, const float* weight, const i32* pairs,
                                            void* out, i32 slots, i32 columns, i32 splits, i32 rows, i32 to_bf16) {
  const i32 column = (ptx::block_y() * ptx::block_threads() + ptx::thread()) * 4;
  const u64 token = ptx::block_x();
  if (column >= columns) return;
  const u64 part = static_cast<u64>(rows) * columns;
  float sum[4] = {};
  for (i32 j = 0; j < slots; ++j) {
    const i32 from = pair[token * slots + j];
    if (from >= *pairs) continue;
    float row[4];
    parts::sum4(row, y + static_cast<u64>(from) * columns + column, part, splits);
    const float by = weight[token * slots + j];
    for (i32 i = 0; i < 4; ++i) sum[i] = ptx::add(sum[i], ptx::multiply(row[i], by));
  }
  const u64 at = token * columns + column;
  if (to_bf16) {
    u32* to = reinterpret_cast<u32*>(static_cast<u16*>(out) + at);
    to[0] = ptx::to_bf16x2(sum[0], sum[1]);
    to[1] = ptx::to_bf16x2(sum[2], sum[3]);
  } else {
    for (i32 i = 0; i < 4; ++i) static_cast<float*>(out)[at + i] = sum[i];
  }
}
