// Rounds activations to int8 groups, for all vector instruction sets; `S` as in tile_rows.inl.hpp. The arithmetic is that of
// the scalar table, bit for bit.
#pragma once

#include "tile_layout.hpp"

namespace gangline {
namespace {

// Exactly `group` numbers, a multiple of 32.
template <class S>
inline void quantize_group(const float* x, int group, std::int8_t* q, float* scale, std::int32_t* sum) {
    const float largest = S::largest_magnitude(x, group);
    const bool vanishes = largest < smallest_magnitude;
    *scale = vanishes ? 0.0F : largest / 127.0F;
    *sum = S::round_to_bytes(x, group, vanishes ? 0.0F : 127.0F / largest, q);
}

template <class S>
void quantize_rows(const float* x, std::ptrdiff_t stride, int tokens, int cols, int group, int padded, std::int8_t* q,
                   float* scale, std::int32_t* sum) {
    constexpr int largest_group = 256;
    for (int t = 0; t < tokens; ++t) {
        for (int c = 0; c < padded; c += group) {
            const float* from = x + t * stride + c;
            float part[largest_group];
            if (cols - c < group) {
                for (int i = 0; i < group; ++i) part[i] = i < cols - c ? from[i] : 0.0F;
                from = part;
            }
            quantize_group<S>(from, group, q, scale++, sum++);
            q += group;
        }
    }
}

}  // namespace
}  // namespace gangline
