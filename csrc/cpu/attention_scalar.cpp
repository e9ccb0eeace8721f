// Attention for the platform's baseline.
#include <cstddef>
#include <cstdint>

#include "attention.hpp"

namespace gangline {
namespace {
#include "attention.inl.hpp"
}  // namespace

const AttentionKernels* scalar_attention() { return &kTable; }

}  // namespace gangline
