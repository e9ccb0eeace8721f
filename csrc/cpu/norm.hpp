// Weights of an RMS norm, and where they lie.
#pragma once

#include "matrix.hpp"

namespace gangline {

// Read where the model keeps them (f32, f16 or bf16).
struct Norm {
    const void* weight = nullptr;
    Format format = Format::f32;
    int size = 0;
    float eps = 0.0f;
};

}  // namespace gangline
