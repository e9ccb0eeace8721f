// Compiled for Advanced SIMD with dot products; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__ARM_FEATURE_DOTPROD)

#include "sparse_plain.inl.hpp"
#include "tile_neon.hpp"
#include "vector_table.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table =
    vector_table<Neon, sparse_matmul<Format::sparse_bf16>, sparse_matmul<Format::sparse_f16>,
                 sparse_matmul<Format::sparse_int8>, sparse_matmul<Format::sparse_int4>>("neon");

}  // namespace

const Kernels* neon_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* neon_kernels() { return nullptr; }

}  // namespace gangline

#endif
