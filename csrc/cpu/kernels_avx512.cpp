// Compiled for AVX-512 F, BW, DQ, VL; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "sparse_rows.inl.hpp"
#include "sparse_avx512.hpp"
#include "tile_avx512.hpp"
#include "vector_table.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table =
    vector_table<Avx512, sparse_matmul<SparseAvx512, Format::sparse_bf16>, sparse_matmul<SparseAvx512, Format::sparse_f16>,
                 sparse_matmul<SparseAvx512, Format::sparse_int8>, sparse_matmul<SparseAvx512, Format::sparse_int4>>("avx512");

}  // namespace

const Kernels* avx512_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace gangline

#endif
