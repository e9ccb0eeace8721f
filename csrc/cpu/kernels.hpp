// One table of functions for each instruction set; chosen once, at run time, by what the processor has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "matrix.hpp"
#include "row_ops.hpp"

namespace gangline {

struct Kernels {
    const char* name;
    // Indexed by Format.
    MatmulRows matmul[formats];
    // Rounds rows [tokens, cols] of fp32 to int8 groups: scale = max|x| / 127, q = round to nearest even. Fills columns up
    // to `padded` with zeros.
    void (*quantize_rows)(const float* x, std::ptrdiff_t stride, int tokens, int cols, int group, int padded,
                          std::int8_t* q, float* scale, std::int32_t* sum);
    // Gates, sums and conversions; row_ops.inl.hpp has them for every instruction set.
    RowOps rows;
};

// The tables that were compiled in; a null pointer where this architecture has no such instruction set.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();        // AVX2, FMA, F16C
const Kernels* avx_vnni_kernels();    // and AVX-VNNI
const Kernels* avx512_kernels();      // AVX2's and AVX-512 F, BW, DQ, VL
const Kernels* avx512_vnni_kernels(); // and VNNI, BF16, VBMI
const Kernels* neon_kernels();        // Advanced SIMD with dot products

// The table in use: the widest that runs here, or the one that the environment variable GANGLINE_CPU names (scalar, avx2,
// avx_vnni, avx512, avx512_vnni, neon). Throws std::runtime_error when that one cannot run here.
const Kernels& kernels();
// For tests: use another table from now on. Throws std::runtime_error when it cannot run here.
void use_kernels(const std::string& name);
// Names of the tables that can run here, narrowest first.
std::vector<std::string> usable_kernels();

}  // namespace gangline
