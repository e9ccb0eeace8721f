#include "attention.hpp"

#if defined(__AVX512F__)
#include "attention.inl.hpp"

namespace gangline {

const AttentionKernels* avx512_attention() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const AttentionKernels* avx512_attention() { return nullptr; }

}  // namespace gangline

#endif
