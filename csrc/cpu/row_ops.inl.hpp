// RowOps for the instruction set of the including file.
#pragma once

#include "row_ops.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

inline Vec sigmoid_times(Vec x, Vec minus_alpha) {
    return x / (Vec::all(1.0f) + exponential(x * minus_alpha));
}

// x * Phi(x), Phi by erfc of |x| / sqrt(2), which has no cancellation on either side. With t = 1 / (1 + z / 2) the quotient
// erfc(z) exp(z^2) / t is smooth; its polynomial of degree 9 in t (our least-squares fit over z in [0, 10]) is within 1e-7.
inline Vec gelu(Vec x) {
    static constexpr float coefficient[] = {0.013534649275243282f, -0.12961404025554657f, 0.44281113147735596f,
                                            -0.6870458126068115f, 0.43415188789367676f, -0.10452847927808762f,
                                            0.22744551301002502f, 0.23828822374343872f, 0.2828940153121948f,
                                            0.2820628881454468f};
    const Vec magnitude = max(x, Vec::zero() - x);
    const Vec z = magnitude * Vec::all(0.70710678f);
    const Vec t = Vec::all(1.0f) / fma(z, Vec::all(0.5f), Vec::all(1.0f));
    Vec p = Vec::all(coefficient[0]);
    for (int i = 1; i < 10; ++i) p = fma(p, t, Vec::all(coefficient[i]));
    // exp(-x^2 / 2) from x itself: z is rounded.
    const Vec half_tail = Vec::all(0.5f) * p * t * exponential(magnitude * magnitude * Vec::all(-0.5f));
    return x * positive_or(x, Vec::all(1.0f) - half_tail, half_tail);
}

// 0.5 x (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline Vec gelu_tanh(Vec x) {
    const Vec inner = fma(x * x, Vec::all(0.044715f), Vec::all(1.0f));
    return x / (Vec::all(1.0f) + exponential(x * inner * Vec::all(-1.5957691216f)));
}

template <Activation activation>
inline Vec activate(Vec x, Vec minus_alpha) {
    if constexpr (activation == Activation::silu) return sigmoid_times(x, minus_alpha);
    if constexpr (activation == Activation::gelu) return gelu(x);
    if constexpr (activation == Activation::gelu_tanh) return gelu_tanh(x);
    if constexpr (activation == Activation::relu) return max(x, Vec::zero());
    if constexpr (activation == Activation::relu2) {
        const Vec positive = max(x, Vec::zero());
        return positive * positive;
    }
    return x;
}

template <Activation activation>
inline Vec gate_one(const Gate& spec, Vec gate, Vec up) {
    const Vec minus_alpha = Vec::all(-spec.alpha);
    if (!spec.gated) return activate<activation>(up, minus_alpha);
    if (spec.clamp == Clamp::none) {
        return activate<activation>(gate, minus_alpha) * (up + Vec::all(spec.up_shift));
    }
    const Vec limit = Vec::all(spec.limit);
    up = max(min(up, limit), Vec::zero() - limit);
    if (spec.clamp == Clamp::before) gate = min(gate, limit);
    Vec acted = activate<activation>(gate, minus_alpha);
    if (spec.clamp == Clamp::after) acted = min(acted, limit);
    return acted * (up + Vec::all(spec.up_shift));
}

// One vector of values that lie `step` floats apart, `count` of them wanted.
inline Vec gather(const float* p, int step, int count) {
    if (step == 1) return count == Vec::width ? Vec::load(p) : load_part(p, count);
    float buffer[Vec::width] = {};
    for (int i = 0; i < count; ++i) buffer[i] = p[i * step];
    return Vec::load(buffer);
}

template <Activation activation>
void gate_loop(const Gate& spec, const float* gate, const float* up, int step, float* h, int n) {
    for (int i = 0; i < n; i += Vec::width) {
        const int count = n - i < Vec::width ? n - i : Vec::width;
        const std::ptrdiff_t at = std::ptrdiff_t{i} * step;
        const Vec up_i = gather(up + at, step, count);
        const Vec gate_i = spec.gated ? gather(gate + at, step, count) : up_i;
        const Vec h_i = gate_one<activation>(spec, gate_i, up_i);
        if (count == Vec::width) h_i.store(h + i);
        else store_part(h_i, h + i, count);
    }
}

void gate_row(const Gate& spec, const float* gate, const float* up, int step, float* h, int n) {
    switch (spec.activation) {
        case Activation::identity: return gate_loop<Activation::identity>(spec, gate, up, step, h, n);
        case Activation::silu: return gate_loop<Activation::silu>(spec, gate, up, step, h, n);
        case Activation::gelu: return gate_loop<Activation::gelu>(spec, gate, up, step, h, n);
        case Activation::gelu_tanh: return gate_loop<Activation::gelu_tanh>(spec, gate, up, step, h, n);
        case Activation::relu: return gate_loop<Activation::relu>(spec, gate, up, step, h, n);
        case Activation::relu2: return gate_loop<Activation::relu2>(spec, gate, up, step, h, n);
    }
}

void accumulate_row(float weight, const float* x, float* acc, int n) {
    const Vec w = Vec::all(weight);
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) fma(w, Vec::load(x + i), Vec::load(acc + i)).store(acc + i);
    if (i < n) store_part(fma(w, load_part(x + i, n - i), load_part(acc + i, n - i)), acc + i, n - i);
}

void widen_bf16_row(const std::uint16_t* x, float* y, int n) {
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) Vec::load_bf16(x + i).store(y + i);
    for (; i < n; ++i) y[i] = bf16_to_float(x[i]);
}

void widen_f16_row(const std::uint16_t* x, float* y, int n) {
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) Vec::load_f16(x + i).store(y + i);
    for (; i < n; ++i) y[i] = f16_to_float(x[i]);
}

void narrow_bf16_row(const float* x, std::uint16_t* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = float_to_bf16(x[i]);
}

void narrow_f16_row(const float* x, std::uint16_t* y, int n) {
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) Vec::load(x + i).store_f16(y + i);
    for (; i < n; ++i) y[i] = float_to_f16(x[i]);
}

constexpr RowOps row_ops{gate_row, accumulate_row, widen_bf16_row, widen_f16_row, narrow_bf16_row, narrow_f16_row};

}  // namespace
}  // namespace gangline
