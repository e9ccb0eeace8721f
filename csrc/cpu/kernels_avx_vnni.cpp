// Compiled for AVX2, FMA, F16C and AVX-VNNI; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)

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
    "avx_vnni",
    {float_matmul<F32Weights>, float_matmul<F16Weights>, float_matmul<Bf16Weights>,
     matmul_tiles<AvxVnni, Format::tile_int2>, matmul_tiles<AvxVnni, Format::tile_int3>, matmul_tiles<AvxVnni, Format::tile_int4>,
     matmul_tiles<AvxVnni, Format::tile_int6>, matmul_tiles<AvxVnni, Format::tile_int8>, matmul_tiles<AvxVnni, Format::tile_mxfp4>,
     ggml_matmul<Q4_0>, ggml_matmul<Q8_0>, super_matmul<AvxVnni, Q4_K>, super_matmul<AvxVnni, Q5_K>, super_matmul<AvxVnni, Q6_K>,
     sparse_matmul<SparseAvxVnni, Format::sparse_bf16>, sparse_matmul<SparseAvxVnni, Format::sparse_f16>,
     sparse_matmul<SparseAvxVnni, Format::sparse_int8>, sparse_matmul<SparseAvxVnni, Format::sparse_int4>},
    quantize_rows<AvxVnni>,
    row_ops,
};

}  // namespace

const Kernels* avx_vnni_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx_vnni_kernels() { return nullptr; }

}  // namespace gangline

#endif
