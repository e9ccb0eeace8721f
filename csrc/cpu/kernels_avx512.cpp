#include "kernels.hpp"

namespace gangline {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace gangline
