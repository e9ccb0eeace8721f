// h[p] = act(gate[p]) (up[p] + shift) in bf16, where gate and up come in parts: y is [splits][2][rows][columns] in fp32.
// The last step of a gated product whose columns were split over several blocks (ssmm.cu).
//
// One thread makes four neighbouring columns of one pair: grid (rows, blocks of columns). Rows at or past `pairs` stay.
#include <gate.cuh>
#include <parts.cuh>

extern "C" __global__ void gangline_gate(const float* y, const i32* pairs, u16* h, i32 rows, i32 columns, i32 splits,
                                         float alpha, float limit, i32 late) {
  const i32 column = (ptx::block_y() * ptx::block_threads() + ptx::thread()) * 4;
  const i32 pair = ptx::block_x();
  if (column >= columns || pair >= *pairs) return;
  const u64 at = static_cast<u64>(pair) * columns + column, matrix = static_cast<u64>(rows) * columns;
  float of_gate[4], of_up[4], out[4];
  parts::sum4(of_gate, y + at, 2 * matrix, splits);
  parts::sum4(of_up, y + matrix + at, 2 * matrix, splits);
  const gate::Form form{alpha, limit, late};
  for (i32 i = 0; i < 4; ++i) out[i] = gate::apply<GANGLINE_ACTIVATION>(form, of_gate[i], of_up[i]);
  u32* to = reinterpret_cast<u32*>(h + at);
  to[0] = ptx::to_bf16x2(out[0], out[1]);
  to[1] = ptx::to_bf16x2(out[2], out[3]);
}
