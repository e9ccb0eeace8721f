// Attention with AVX-512; compiled with those flags.
#include <cstddef>
#include <cstdint>

#include "attention.hpp"

#if defined(__x86_64__) || defined(_M_X64)

namespace gangline {
namespace {
#include "attention.inl.hpp"
}  // namespace

const AttentionKernels* avx512_attention() { return &kTable; }

}  // namespace gangline

#else

namespace gangline {
const AttentionKernels* avx512_attention() { return nullptr; }
}  // namespace gangline

#endif
