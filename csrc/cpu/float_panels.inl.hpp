// Many tokens with plain weights: a panel of rows is expanded to fp32 once and stays in the first-level cache while the tokens
// pass by. A tile of rows and tokens takes one running vector of float_rows.inl.hpp after the other, so that twice as large a
// tile fits the registers; every sum runs in that file's order.
#pragma once

#include "matrix.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

constexpr int chains = 2;  // running vectors of a row and token, which take turns along the columns

constexpr int float_panel_rows = 8;
constexpr int float_panel_columns = 512;
constexpr int float_panel_tokens = 48;  // whose running vectors are kept between two panels of the same rows
constexpr int tile_height = 4;    // rows
constexpr int tile_width = Vec::width == 16 ? 6 : 3;  // tokens: tiles that leave registers for one row and these tokens
static_assert(float_panel_columns % (chains * Vec::width) == 0 && float_panel_rows % tile_height == 0);

struct FloatPanel {
    alignas(64) float weights[float_panel_rows][float_panel_columns];
    alignas(64) float sums[float_panel_tokens][chains][float_panel_rows][Vec::width];
};

// The last `count` columns, the rest of the vector zero.
template <class Weights>
inline Vec load_weights_part(const std::uint8_t* p, int count) {
    std::uint8_t buffer[Vec::width * Weights::size] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(count) * Weights::size);
    return Weights::load(buffer);
}

template <class Weights>
inline void expand(const std::uint8_t* w, int columns, float* out) {
    int c = 0;
    for (; c + Vec::width <= columns; c += Vec::width) Weights::load(w + std::ptrdiff_t{c} * Weights::size).store(out + c);
    if (c < columns) load_weights_part<Weights>(w + std::ptrdiff_t{c} * Weights::size, columns - c).store(out + c);
}

// Adds `columns` columns of four rows, from `row` on, and `T` tokens, from `token` on, to their running vectors.
template <int T>
inline void add_tile(FloatPanel& panel, int row, int token, int columns, const float* x, std::ptrdiff_t stride) {
    for (int k = 0; k < chains; ++k) {
        Vec sum[tile_height][T];
        for (int r = 0; r < tile_height; ++r)
            for (int t = 0; t < T; ++t) sum[r][t] = Vec::load(panel.sums[token + t][k][row + r]);
        const auto add = [&](int c, auto load) {
            Vec activation[T];
            for (int t = 0; t < T; ++t) activation[t] = load(x + t * stride + c);
            for (int r = 0; r < tile_height; ++r) {
                const Vec weight = Vec::load(panel.weights[row + r] + c);
                for (int t = 0; t < T; ++t) sum[r][t] = fma(weight, activation[t], sum[r][t]);
            }
        };
        int c = k * Vec::width;
        for (; c + Vec::width <= columns; c += chains * Vec::width) add(c, [](const float* p) { return Vec::load(p); });
        if (c < columns) add(c, [&](const float* p) { return load_part(p, columns - c); });
        for (int r = 0; r < tile_height; ++r)
            for (int t = 0; t < T; ++t) sum[r][t].store(panel.sums[token + t][k][row + r]);
    }
}

inline void add_tokens(FloatPanel& panel, int tokens, int columns, const float* x, std::ptrdiff_t stride) {
    int t = 0;
    for (; t + tile_width <= tokens; t += tile_width)
        for (int r = 0; r < float_panel_rows; r += tile_height) add_tile<tile_width>(panel, r, t, columns, x + t * stride, stride);
    for (; t < tokens; ++t)
        for (int r = 0; r < float_panel_rows; r += tile_height) add_tile<1>(panel, r, t, columns, x + t * stride, stride);
}

// Eight rows and at most `float_panel_tokens` tokens.
template <class Weights>
inline void panel_of_rows(const std::uint8_t* w, int cols, const float* x, std::ptrdiff_t stride, int tokens, float* y,
                          std::ptrdiff_t y_stride) {
    FloatPanel panel;
    std::memset(panel.sums, 0, sizeof(panel.sums[0]) * static_cast<std::size_t>(tokens));
    for (int c = 0; c < cols; c += float_panel_columns) {
        const int columns = cols - c < float_panel_columns ? cols - c : float_panel_columns;
        for (int r = 0; r < float_panel_rows; ++r)
            expand<Weights>(w + (std::ptrdiff_t{r} * cols + c) * Weights::size, columns, panel.weights[r]);
        add_tokens(panel, tokens, columns, x + c, stride);
    }
    for (int t = 0; t < tokens; ++t)
        for (int r = 0; r < float_panel_rows; ++r)
            y[t * y_stride + r] = (Vec::load(panel.sums[t][0][r]) + Vec::load(panel.sums[t][1][r])).sum();
}

}  // namespace
}  // namespace gangline
