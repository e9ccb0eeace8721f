// Attention with Advanced SIMD.
#include <cstddef>
#include <cstdint>

#include "attention.hpp"

#if defined(__aarch64__)

namespace gangline {
namespace {
#include "attention.inl.hpp"
}  // namespace

const AttentionKernels* neon_attention() { return &kTable; }

}  // namespace gangline

#else

namespace gangline {
const AttentionKernels* neon_attention() { return nullptr; }
}  // namespace gangline

#endif
