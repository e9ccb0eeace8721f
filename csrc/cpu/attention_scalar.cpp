#define GANGLINE_SCALAR
#include "attention.inl.hpp"

namespace gangline {

const AttentionKernels* scalar_attention() { return &table; }

}  // namespace gangline
