// The table of kernels of a vector instruction set `S` (see tile_rows.inl.hpp). The including file is compiled for that set.
#pragma once

#include "float_rows.inl.hpp"
#include "ggml_rows.inl.hpp"
#include "kernels.hpp"
#include "quantize_rows.inl.hpp"
#include "row_ops.inl.hpp"
#include "super_panels.inl.hpp"
#include "tile_rows.inl.hpp"

namespace gangline {
namespace {

// `Sparse`: the products of the sparse formats, in their order.
template <class S, MatmulRows... Sparse>
constexpr Kernels vector_table(const char* name) {
    return {
        name,
        {float_matmul<F32Weights>, float_matmul<F16Weights>, float_matmul<Bf16Weights>,
         matmul_tiles<S, Format::tile_int2>, matmul_tiles<S, Format::tile_int3>, matmul_tiles<S, Format::tile_int4>,
         matmul_tiles<S, Format::tile_int6>, matmul_tiles<S, Format::tile_int8>, matmul_tiles<S, Format::tile_mxfp4>,
         ggml_matmul<Q4_0>, ggml_matmul<Q8_0>, super_matmul<S, Q4_K>, super_matmul<S, Q5_K>, super_matmul<S, Q6_K>,
         Sparse...},
        quantize_rows<S>,
        row_ops,
    };
}

}  // namespace
}  // namespace gangline
