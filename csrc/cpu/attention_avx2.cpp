#include "attention.hpp"

#if defined(__AVX2__)
#include "attention.inl.hpp"

namespace gangline {

const AttentionKernels* avx2_attention() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const AttentionKernels* avx2_attention() { return nullptr; }

}  // namespace gangline

#endif
