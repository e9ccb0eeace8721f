// Compiled for Advanced SIMD with dot products; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__ARM_FEATURE_DOTPROD)

#include "float_rows.inl.hpp"
#include "ggml_rows.inl.hpp"
#include "quantize_rows.inl.hpp"
#include "row_ops.inl.hpp"
#include "sparse_plain.inl.hpp"
#include "tile_rows.inl.hpp"
#include "tile_neon.hpp"
#include "super_panels.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table = {
    "neon",
    {float_matmul<F32Weights>, float_matmul<F16Weights>, float_matmul<Bf16Weights>,
     matmul_tiles<Neon, Format::tile_int2>, matmul_tiles<Neon, Format::tile_int3>, matmul_tiles<Neon, Format::tile_int4>,
     matmul_tiles<Neon, Format::tile_int6>, matmul_tiles<Neon, Format::tile_int8>, matmul_tiles<Neon, Format::tile_mxfp4>,
     ggml_matmul<Q4_0>, ggml_matmul<Q8_0>, super_matmul<Neon, Q4_K>, super_matmul<Neon, Q5_K>, super_matmul<Neon, Q6_K>,
     sparse_matmul<Format::sparse_bf16>, sparse_matmul<Format::sparse_f16>,
     sparse_matmul<Format::sparse_int8>, sparse_matmul<Format::sparse_int4>},
    quantize_rows<Neon>,
    row_ops,
};

}  // namespace

const Kernels* neon_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* neon_kernels() { return nullptr; }

}  // namespace gangline

#endif
