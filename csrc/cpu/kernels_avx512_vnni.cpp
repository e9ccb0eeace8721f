// Compiled for AVX-512 with VNNI, BF16 and VBMI; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include "float_rows.inl.hpp"
#include "ggml_rows.inl.hpp"
#include "quantize_rows.inl.hpp"
#include "row_ops.inl.hpp"
#include "sparse_rows.inl.hpp"
#include "sparse_avx512.hpp"
#include "tile_rows.inl.hpp"
#include "tile_avx512.hpp"
#include "super_panels.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table = {
    "avx512_vnni",
    {float_matmul<F32Weights>, float_matmul<F16Weights>, float_matmul<Bf16Weights>,
     matmul_tiles<Avx512Vnni, Format::tile_int2>, matmul_tiles<Avx512Vnni, Format::tile_int3>, matmul_tiles<Avx512Vnni, Format::tile_int4>,
     matmul_tiles<Avx512Vnni, Format::tile_int6>, matmul_tiles<Avx512Vnni, Format::tile_int8>, matmul_tiles<Avx512Vnni, Format::tile_mxfp4>,
     ggml_matmul<Q4_0>, ggml_matmul<Q8_0>, super_matmul<Avx512Vnni, Q4_K>, super_matmul<Avx512Vnni, Q5_K>, super_matmul<Avx512Vnni, Q6_K>,
     sparse_matmul<SparseAvx512Vnni, Format::sparse_bf16>, sparse_matmul<SparseAvx512Vnni, Format::sparse_f16>,
     sparse_matmul<SparseAvx512Vnni, Format::sparse_int8>, sparse_matmul<SparseAvx512Vnni, Format::sparse_int4>},
    quantize_rows<Avx512Vnni>,
    row_ops,
};

}  // namespace

const Kernels* avx512_vnni_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx512_vnni_kernels() { return nullptr; }

}  // namespace gangline

#endif
