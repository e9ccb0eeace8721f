// Softmax and the sum of values of attention.hpp, for the instruction set of the including file.
#pragma once

#include "attention.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

struct F32Values {
    static constexpr int size = 4;
    static Vec load(const std::uint8_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};
struct F16Values {
    static constexpr int size = 2;
    static Vec load(const std::uint8_t* p) { return Vec::load_f16(p); }
};
struct Bf16Values {
    static constexpr int size = 2;
    static Vec load(const std::uint8_t* p) { return Vec::load_bf16(p); }
};

inline float largest(const float* s, int n) {
    int i = Vec::width <= n ? Vec::width : 0;
    float top = s[0];
    if (i > 0) {
        Vec lanes = Vec::load(s);
        for (; i + Vec::width <= n; i += Vec::width) lanes = max(lanes, Vec::load(s + i));
        float lane[Vec::width];
        lanes.store(lane);
        for (const float value : lane) top = value > top ? value : top;
    }
    for (; i < n; ++i) top = s[i] > top ? s[i] : top;
    return top;
}

// Scores of one head become exp(scaling * (score - max)); returns their sum. The scratch is as long as a whole chunk, so
// the last vector may reach beyond `n`; what lies there does not count.
inline float soften(float* s, int n, float scaling, float top) {
    const Vec scale = Vec::all(scaling), shift = Vec::all(top);
    Vec total = Vec::zero();
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) {
        const Vec e = exponential((Vec::load(s + i) - shift) * scale);
        e.store(s + i);
        total = total + e;
    }
    if (i < n) {
        exponential((load_part(s + i, n - i) - shift) * scale).store(s + i);
        total = total + load_part(s + i, n - i);
    }
    return total.sum();
}

// `H` heads, `C` vectors of columns beginning at `column`; the last of them may be a part.
template <class Values, int H, int C>
inline void sum_block(const AttentionChunk& c, int head, int column) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{c.head_dim} * Values::size;
    const std::uint8_t* values = static_cast<const std::uint8_t*>(c.values) + std::ptrdiff_t{column} * Values::size;
    const float* weights = c.scores + head * kAttentionChunk;
    Vec acc[H][C];
    for (int h = 0; h < H; ++h)
        for (int i = 0; i < C; ++i) acc[h][i] = Vec::zero();
    for (int p = 0; p < c.positions; ++p, values += row_bytes) {
        Vec value[C];
        for (int i = 0; i < C; ++i) value[i] = Values::load(values + i * Vec::width * Values::size);
        for (int h = 0; h < H; ++h) {
            const Vec weight = Vec::all(weights[h * kAttentionChunk + p]);
            for (int i = 0; i < C; ++i) acc[h][i] = fma(weight, value[i], acc[h][i]);
        }
    }
    for (int h = 0; h < H; ++h)
        for (int i = 0; i < C; ++i) acc[h][i].store(c.acc + (head + h) * std::ptrdiff_t{c.head_dim} + column + i * Vec::width);
}

// Columns that are no whole vector, one by one.
template <class Values>
inline void sum_rest(const AttentionChunk& c, int head, int column) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{c.head_dim} * Values::size;
    const int count = c.head_dim - column;
    Vec acc = Vec::zero();
    for (int p = 0; p < c.positions; ++p) {
        std::uint8_t part[Vec::width * Values::size] = {};
        std::memcpy(part, static_cast<const std::uint8_t*>(c.values) + p * row_bytes + std::ptrdiff_t{column} * Values::size,
                    static_cast<std::size_t>(count) * Values::size);
        acc = fma(Vec::all(c.scores[head * kAttentionChunk + p]), Values::load(part), acc);
    }
    store_part(acc, c.acc + head * std::ptrdiff_t{c.head_dim} + column, count);
}

// Sums that are held in registers: half of the 32 or 16 there are.
constexpr int held_sums = Vec::width == 8 ? 8 : 16;

template <class Values, int H>
inline void sum_heads(const AttentionChunk& c, int head) {
    constexpr int C = held_sums / H < 8 ? held_sums / H : 8;
    int column = 0;
    for (; column + C * Vec::width <= c.head_dim; column += C * Vec::width) sum_block<Values, H, C>(c, head, column);
    for (; column + Vec::width <= c.head_dim; column += Vec::width) sum_block<Values, H, 1>(c, head, column);
    for (int h = 0; column < c.head_dim && h < H; ++h) sum_rest<Values>(c, head + h, column);
}

template <class Values>
void sum_values(const AttentionChunk& c) {
    int head = 0;
    for (; head + 4 <= c.group; head += 4) sum_heads<Values, 4>(c, head);
    for (; head + 2 <= c.group; head += 2) sum_heads<Values, 2>(c, head);
    for (; head < c.group; ++head) sum_heads<Values, 1>(c, head);
}

void weigh_values(const AttentionChunk& c) {
    for (int g = 0; g < c.group; ++g) {
        float* scores = c.scores + g * kAttentionChunk;
        const float top = largest(scores, c.positions);
        c.sum[g] = soften(scores, c.positions, c.scaling, top);
        c.max[g] = top * c.scaling;
    }
    switch (c.format) {
        case Format::bf16: return sum_values<Bf16Values>(c);
        case Format::f16: return sum_values<F16Values>(c);
        default: return sum_values<F32Values>(c);
    }
}

constexpr AttentionKernels table{weigh_values};

}  // namespace
}  // namespace gangline
