// Plain C++: what every other table is measured against, and what runs where none of them does.

#define GANGLINE_SCALAR 1

#include <bit>
#include <cmath>
#include <cstring>

#include "float_rows.inl.hpp"
#include "ggml_rows.inl.hpp"
#include "kernels.hpp"
#include "row_ops.inl.hpp"
#include "sparse_plain.inl.hpp"
#include "super_plain.inl.hpp"
#include "tile_layout.hpp"
#include "tile_scale.hpp"

namespace gangline {
namespace {

// Twice the value of each E2M1 code.
constexpr int doubled_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The code at one of the 64 positions of a quad; `codes` is where the group begins.
template <Format F>
int code_at(const std::uint8_t* codes, int group, int quad, int position) {
    if constexpr (F == Format::tile_int8) {
        return codes[quad * quad_bytes + position];
    } else if constexpr (F == Format::tile_int2) {
        return codes[quad / 4 * quad_bytes + position] >> 2 * (quad % 4) & 3;
    } else if constexpr (F == Format::tile_int3) {
        const std::uint8_t* high = codes + group * tile_rows / 4;
        return code_at<Format::tile_int2>(codes, group, quad, position) |
               (high[quad / 8 * quad_bytes + position] >> quad % 8 & 1) << 2;
    } else if constexpr (F == Format::tile_int6) {
        const std::uint8_t* high = codes + group * tile_rows / 2;
        return code_at<Format::tile_int4>(codes, group, quad, position) |
               code_at<Format::tile_int2>(high, group, quad, position) << 4;
    } else {
        return codes[quad / 2 * quad_bytes + position] >> 4 * (quad % 2) & 15;
    }
}

// The integer that a code stands for, its zero point not yet subtracted.
template <Format F>
int code_value(int code) {
    return F == Format::tile_mxfp4 ? doubled_e2m1[code] : code;
}

template <Format F>
float scale_at(const Matrix& w, const std::uint8_t* scales, int row) {
    if constexpr (F == Format::tile_mxfp4) {
        return scale_of_exponent(scales[row]);
    } else {
        if (w.byte_scales) return static_cast<float>(static_cast<std::int8_t>(scales[row]));
        std::uint16_t half;
        std::memcpy(&half, scales + 2 * row, sizeof(half));
        return scale_of_half(half);
    }
}

template <Format F>
int zero_at(const Matrix& w, const std::uint8_t* zeros, int row) {
    if (F == Format::tile_mxfp4) return 0;
    return w.has_zeros ? zeros[row] : code_zero(F);
}

// One group of all 16 rows as integers [quads][16][4].
template <Format F>
void unpack_group(const std::uint8_t* codes, int group, std::int16_t* values) {
    for (int quad = 0; quad < group / quad_columns; ++quad) {
        for (int position = 0; position < quad_bytes; ++position) {
            const int code = code_at<F>(codes, group, quad, position);
            *values++ = static_cast<std::int16_t>(code_value<F>(code));
        }
    }
}

void multiply_by_row_scales(const std::uint8_t* block, int rows, int tokens, float* y, std::ptrdiff_t y_stride) {
    float scales[tile_rows];
    std::memcpy(scales, block, sizeof scales);
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < rows; ++r) y[t * y_stride + r] *= scales[r];
    }
}

template <Format F>
void matmul_tiles(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    constexpr int largest_group = 128;
    const TileLayout tile = TileLayout::of(w);
    std::int16_t values[largest_group * tile_rows];
    for (int row = row_begin; row < row_end; row += tile_rows) {
        const int rows = row_end - row < tile_rows ? row_end - row : tile_rows;
        const std::uint8_t* block = w.data + static_cast<std::size_t>(row / tile_rows) * tile.block_bytes;
        for (int g = 0; g < tile.groups; ++g) {
            const GroupPlace at_group = GroupPlace::of(tile, g);
            unpack_group<F>(block + at_group.codes, w.group, values);
            for (int t = 0; t < x.tokens; ++t) {
                const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * tile.groups + g;
                const std::int8_t* q = x.q + at * w.group;
                for (int r = 0; r < rows; ++r) {
                    std::int32_t dot = -zero_at<F>(w, block + at_group.zeros, r) * x.sum[at];
                    for (int c = 0; c < w.group; ++c) {
                        dot += values[c / 4 * quad_bytes + 4 * r + c % 4] * q[c];
                    }
                    float& out = y[t * y_stride + row + r];
                    const float scaled = scale_at<F>(w, block + at_group.scales, r) * static_cast<float>(dot);
                    out = std::fma(scaled, x.scale[at], g == 0 ? 0.0F : out);
                }
            }
        }
        if (w.byte_scales) multiply_by_row_scales(block, rows, x.tokens, y + row, y_stride);
    }
}

void quantize_group(const float* x, int count, int group, std::int8_t* q, float* scale, std::int32_t* sum) {
    // Compared as integers, magnitudes keep their order and nan, being the largest, is not lost.
    std::uint32_t largest_bits = 0;
    for (int c = 0; c < count; ++c) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(x[c]) & 0x7FFFFFFFU;
        if (bits > largest_bits) largest_bits = bits;
    }
    const float largest = std::bit_cast<float>(largest_bits);
    const bool vanishes = largest < smallest_magnitude;
    const float inverse = vanishes ? 0.0F : 127.0F / largest;
    *scale = vanishes ? 0.0F : largest / 127.0F;
    *sum = 0;
    for (int c = 0; c < group; ++c) {
        const float scaled = c < count ? x[c] * inverse : 0.0F;
        q[c] = scaled >= -127.5F && scaled <= 127.5F ? static_cast<std::int8_t>(std::nearbyint(scaled)) : std::int8_t{0};
        *sum += q[c];
    }
}

void quantize_rows(const float* x, std::ptrdiff_t stride, int tokens, int cols, int group, int padded, std::int8_t* q,
                   float* scale, std::int32_t* sum) {
    for (int t = 0; t < tokens; ++t) {
        for (int c = 0; c < padded; c += group) {
            const int count = cols - c < group ? cols - c : group;
            quantize_group(x + t * stride + c, count, group, q, scale++, sum++);
            q += group;
        }
    }
}

constexpr Kernels table = {
    "scalar",
    {float_matmul<F32Weights>, float_matmul<F16Weights>, float_matmul<Bf16Weights>,
     matmul_tiles<Format::tile_int2>, matmul_tiles<Format::tile_int3>, matmul_tiles<Format::tile_int4>,
     matmul_tiles<Format::tile_int6>, matmul_tiles<Format::tile_int8>, matmul_tiles<Format::tile_mxfp4>,
     ggml_matmul<Q4_0>, ggml_matmul<Q8_0>, super_matmul<Q4_K>, super_matmul<Q5_K>, super_matmul<Q6_K>,
     sparse_matmul<Format::sparse_bf16>, sparse_matmul<Format::sparse_f16>,
     sparse_matmul<Format::sparse_int8>, sparse_matmul<Format::sparse_int4>},
    quantize_rows,
    row_ops,
};

}  // namespace

const Kernels* scalar_kernels() { return &table; }

}  // namespace gangline
