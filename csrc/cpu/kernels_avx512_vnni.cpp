// Compiled for AVX-512 with VNNI, BF16 and VBMI; entered only where the processor has them.

#include "kernels.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)

#include "sparse_rows.inl.hpp"
#include "sparse_avx512.hpp"
#include "tile_avx512.hpp"
#include "vector_table.inl.hpp"

namespace gangline {
namespace {

constexpr Kernels table =
    vector_table<Avx512Vnni, sparse_matmul<SparseAvx512Vnni, Format::sparse_bf16>, sparse_matmul<SparseAvx512Vnni, Format::sparse_f16>,
                 sparse_matmul<SparseAvx512Vnni, Format::sparse_int8>, sparse_matmul<SparseAvx512Vnni, Format::sparse_int4>>("avx512_vnni");

}  // namespace

const Kernels* avx512_vnni_kernels() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const Kernels* avx512_vnni_kernels() { return nullptr; }

}  // namespace gangline

#endif
