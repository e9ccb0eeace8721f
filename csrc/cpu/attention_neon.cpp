#include "attention.hpp"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include "attention.inl.hpp"

namespace gangline {

const AttentionKernels* neon_attention() { return &table; }

}  // namespace gangline

#else

namespace gangline {

const AttentionKernels* neon_attention() { return nullptr; }

}  // namespace gangline

#endif
