// Which attention belongs to which table of kernels.
#include "attention.hpp"

#include <string_view>

#include "kernels.hpp"

namespace gangline {

const AttentionKernels& attention_kernels() {
    const std::string_view name = kernels().name;
    const AttentionKernels* chosen = nullptr;
    if (name.starts_with("avx512")) chosen = avx512_attention();
    else if (name.starts_with("avx2")) chosen = avx2_attention();
    else if (name == "neon") chosen = neon_attention();
    return chosen != nullptr ? *chosen : *scalar_attention();
}

}  // namespace gangline
