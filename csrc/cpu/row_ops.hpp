// Elementwise work on rows of floats, one version for each instruction set.
#pragma once

#include <cstdint>

#include "gates.hpp"

namespace gangline {

struct RowOps {
    // h[i] for i in [0, n); gate and up are read `step` floats apart (2 when their columns alternate). Without a gate matrix
    // only `up` is read.
    void (*gate)(const Gate& spec, const float* gate, const float* up, int step, float* h, int n);
    // acc[i] = fma(weight, x[i], acc[i])
    void (*accumulate)(float weight, const float* x, float* acc, int n);
    void (*widen_bf16)(const std::uint16_t* x, float* y, int n);
    void (*widen_f16)(const std::uint16_t* x, float* y, int n);
    void (*narrow_bf16)(const float* x, std::uint16_t* y, int n);
    void (*narrow_f16)(const float* x, std::uint16_t* y, int n);
};

}  // namespace gangline
