// Compiled for AVX2, FMA, F16C and AVX-VNNI; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)

#include "sparse_rows.inl.hpp"
#include "sparse_avx2.hpp"
#include "tile_avx2.hpp"
#include "vector_table.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table =
    vector_table<AvxVnni, sparse_matmul<SparseAvxVnni, Format::sparse_bf16>, sparse_matmul<SparseAvxVnni, Format::sparse_f16>,
                 sparse_matmul<SparseAvxVnni, Format::sparse_int8>, sparse_matmul<SparseAvxVnni, Format::sparse_int4>>("avx_vnni");

}  // namespace

const Kernels* avx_vnni_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx_vnni_kernels() { return nullptr; }

}  // namespace gangline

#endif
