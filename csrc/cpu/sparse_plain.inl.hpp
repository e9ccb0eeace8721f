// y = x W^T for sparse tiles, in plain C++: see sparse_rows.inl.hpp for the order of the sums, which is the same here, and
// sparse_layout.hpp for the bytes.
#pragma once

#include <cstring>

#include "half.hpp"
#include "sparse_layout.hpp"
#include "sparse_sums.inl.hpp"

namespace gangline {
namespace {

// Eight kept values of every lane and where in their 16 columns they belong, in the order of the columns.
template <class Number>
struct HalfOfLanes {
    Number value[half_values][sparse_lanes];
    std::uint8_t column[half_values][sparse_lanes];
};

template <Format F>
inline auto sparse_value(const std::uint8_t* values, int quad, int slot, int lane) {
    if constexpr (F == Format::sparse_bf16 || F == Format::sparse_f16) {
        std::uint16_t bits;
        std::memcpy(&bits, values + quad * 64 + lane * 4 + slot * 2, sizeof bits);
        return F == Format::sparse_bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    } else {
        const int plane = quad / 4 * 2 + slot;
        const int at = lane * 4 + quad % 4;
        if constexpr (F == Format::sparse_int8) return values[plane * 64 + at] - 128;
        else return (values[plane / 2 * 64 + at] >> 4 * (plane % 2) & 15) - 8;
    }
}

template <Format F, class Number>
inline void read_half(const std::uint8_t* step, int half, HalfOfLanes<Number>& out) {
    for (int i = 0; i < half_values; ++i) {
        const int quad = half % 2 * 4 + i / 2;
        for (int lane = 0; lane < sparse_lanes; ++lane) {
            std::uint32_t word;
            std::memcpy(&word, step + 4 * lane, sizeof word);
            const unsigned position = word >> (8 * (quad % 4) + 4 * (quad / 4) + 2 * (i % 2)) & 3U;
            out.column[i][lane] = static_cast<std::uint8_t>(i / 2 * 4 + static_cast<int>(position));
            out.value[i][lane] = sparse_value<F>(step + position_bytes, quad, i % 2, lane);
        }
    }
}

// One tile times one token.
template <Format F>
class PlainTile {
public:
    PlainTile(const Matrix& w, const SparseLayout& layout, int tile)
        : w_(w), layout_(layout), tile_(w.data + static_cast<std::size_t>(tile) * layout.tile_bytes) {}

    void multiply(const Activations& x, int token, float* sums) {
        for (int i = 0; i < layout_.accumulators * sparse_lanes; ++i) sums[i] = 0.0F;
        for (int half = 0, segment = 0; half < layout_.halves; ++segment) {
            const int end = half + layout_.segment_halves < layout_.halves ? half + layout_.segment_halves : layout_.halves;
            if constexpr (F == Format::sparse_bf16 || F == Format::sparse_f16) {
                float sum[2][sparse_lanes] = {};
                for (; half < end; ++half) add_numbers(x.x + token * x.stride, half, sum);
                for (int lane = 0; lane < sparse_lanes; ++lane) sum[0][lane] += sum[1][lane];
                add_to_rows(segment, sum[0], sums);
            } else {
                while (half < end) half = add_codes(x, token, half, end, segment, sums);
            }
        }
    }

private:
    const std::uint8_t* step(int half) const {
        return tile_ + layout_.steps_begin + static_cast<std::size_t>(half / 2) * sparse_step_bytes(F);
    }

    void add_to_rows(int segment, const float* sum, float* sums) const {
        const std::uint8_t* shifts = tile_ + layout_.shifts_begin + static_cast<std::size_t>(segment) * sparse_lanes;
        for (int lane = 0; lane < sparse_lanes; ++lane) {
            const int shift = layout_.accumulators > 1 ? shifts[lane] : 0;
            if (shift < layout_.accumulators) sums[shift * sparse_lanes + lane] += sum[lane];
        }
    }

    void add_numbers(const float* x, int half, float (&sum)[2][sparse_lanes]) {
        float part[half_columns] = {};
        const int from = half * half_columns;
        const int count = w_.cols - from < half_columns ? w_.cols - from : half_columns;
        std::memcpy(part, x + from, sizeof(float) * static_cast<std::size_t>(count));
        HalfOfLanes<float> kept;
        read_half<F>(step(half), half, kept);
        for (int i = 0; i < half_values; ++i) {
            for (int lane = 0; lane < sparse_lanes; ++lane) sum[i % 2][lane] += kept.value[i][lane] * part[kept.column[i][lane]];
        }
    }

    // From `half` on, to where the segment or the activation group ends; returns where.
    int add_codes(const Activations& x, int token, int half, int end, int segment, float* sums) {
        const int group = half / 4;
        const int stop = end < 4 * group + 4 ? end : 4 * group + 4;
        const std::int8_t* q = x.q + std::ptrdiff_t{token} * x.padded;
        std::int32_t dot[sparse_lanes] = {};
        for (; half < stop; ++half) {
            HalfOfLanes<std::int32_t> kept;
            read_half<F>(step(half), half, kept);
            for (int i = 0; i < half_values; ++i) {
                for (int lane = 0; lane < sparse_lanes; ++lane) {
                    dot[lane] += kept.value[i][lane] * q[half * half_columns + kept.column[i][lane]];
                }
            }
        }
        const std::uint8_t* scales = tile_ + static_cast<std::size_t>(group >> layout_.group_shift) * sparse_lanes * 2;
        const float scale = x.scale[std::ptrdiff_t{token} * (x.padded / sparse_activation_group) + group];
        float sum[sparse_lanes];
        for (int lane = 0; lane < sparse_lanes; ++lane) {
            std::uint16_t bits;
            std::memcpy(&bits, scales + 2 * lane, sizeof bits);
            sum[lane] = f16_to_float(bits) * static_cast<float>(dot[lane]) * scale;
        }
        add_to_rows(segment, sum, sums);
        return stop;
    }

    const Matrix& w_;
    const SparseLayout& layout_;
    const std::uint8_t* tile_;
};

template <Format F>
void sparse_matmul(const Matrix& w, int row_begin, int row_end, const Activations& x, float* y, std::ptrdiff_t y_stride) {
    const SparseLayout layout = SparseLayout::of(w);
    float sums[most_accumulators * sparse_lanes];
    for (int tile = row_begin / layout.rows; tile * layout.rows < row_end; ++tile) {
        PlainTile<F> one(w, layout, tile);
        for (int t = 0; t < x.tokens; ++t) {
            one.multiply(x, t, sums);
            store_sums(sums, w.sparse, layout, tile, {row_begin, row_end}, y + t * y_stride);
        }
    }
}

}  // namespace
}  // namespace gangline
