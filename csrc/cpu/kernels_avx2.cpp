// Compiled for AVX2, FMA and F16C; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "float_rows.inl.hpp"
#include "ggml_rows.inl.hpp"
#include "quantize_rows.inl.hpp"
#include "row_ops.inl.hpp"
#include "sparse_rows.inl.hpp"
#include "sparse_avx2.hpp"
#include "tile_rows.inl.hpp"
#include "tile_avx2.hpp"
#include "super_panels.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table = {
    "avx2",
    {float_matmul<F32Weights>, float_matmul<F16Weights>, float_matmul<Bf16Weights>,
     matmul_tiles<Avx2, Format::tile_int2>, matmul_tiles<Avx2, Format::tile_int3>, matmul_tiles<Avx2, Format::tile_int4>,
     matmul_tiles<Avx2, Format::tile_int6>, matmul_tiles<Avx2, Format::tile_int8>, matmul_tiles<Avx2, Format::tile_mxfp4>,
     ggml_matmul<Q4_0>, ggml_matmul<Q8_0>, super_matmul<Avx2, Q4_K>, super_matmul<Avx2, Q5_K>, super_matmul<Avx2, Q6_K>,
     sparse_matmul<SparseAvx2, Format::sparse_bf16>, sparse_matmul<SparseAvx2, Format::sparse_f16>,
     sparse_matmul<SparseAvx2, Format::sparse_int8>, sparse_matmul<SparseAvx2, Format::sparse_int4>},
    quantize_rows<Avx2>,
    row_ops,
};

}  // namespace

const Kernels* avx2_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace gangline

#endif
