// Sums over parts of a product: each part is made of other columns, and their order is fixed, so that the sum is too.
#pragma once

#include <ptx.cuh>

namespace parts {

// out = first[0] + first[stride] + ..., four neighbouring numbers each.
__device__ inline void sum4(float (&out)[4], const float* first, u64 stride, i32 count) {
  ptx::load4(out, first);
  for (i32 s = 1; s < count; ++s) {
    float more[4];
    ptx::load4(more, first + s * stride);
    for (i32 i = 0; i < 4; ++i) out[i] = ptx::add(out[i], more[i]);
  }
}

}  // namespace parts
