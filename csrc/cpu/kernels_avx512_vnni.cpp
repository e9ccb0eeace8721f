#include "kernels.hpp"

namespace gangline {

const Kernels* avx512_vnni_kernels() { return nullptr; }

}  // namespace gangline
