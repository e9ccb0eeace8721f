// Compiled for AVX2, FMA and F16C; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "sparse_rows.inl.hpp"
#include "sparse_avx2.hpp"
#include "tile_avx2.hpp"
#include "vector_table.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table =
    vector_table<Avx2, sparse_matmul<SparseAvx2, Format::sparse_bf16>, sparse_matmul<SparseAvx2, Format::sparse_f16>,
                 sparse_matmul<SparseAvx2, Format::sparse_int8>, sparse_matmul<SparseAvx2, Format::sparse_int4>>("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace gangline

#endif
