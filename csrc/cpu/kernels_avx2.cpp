#include "kernels.hpp"

namespace gangline {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace gangline
