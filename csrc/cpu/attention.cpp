#include "attention.hpp"

#include <string_view>

#include "kernels.hpp"

namespace gangline {
namespace {

// The version that belongs to the table of kernels in use.
const AttentionKernels& attention_kernels() {
    const std::string_view name = kernels().name;
    const AttentionKernels* chosen = nullptr;
    if (name.starts_with("avx512")) chosen = avx512_attention();
    else if (name.starts_with("avx2")) chosen = avx2_attention();
    else if (name == "neon") chosen = neon_attention();
    return chosen != nullptr ? *chosen : *scalar_attention();
}

}  // namespace

void attend(const AttentionChunk& c) {
    // Keys are a matrix of plain numbers, one row a position; the heads of the group are its tokens.
    Matrix keys;
    keys.data = static_cast<const std::uint8_t*>(c.keys);
    keys.rows = c.positions;
    keys.cols = c.head_dim;
    keys.format = c.format;
    Activations queries;
    queries.x = c.q;
    queries.stride = c.head_dim;
    queries.tokens = c.group;
    queries.cols = c.head_dim;
    kernels().matmul[static_cast<int>(c.format)](keys, 0, c.positions, queries, c.scores, kAttentionChunk);
    attention_kernels().weigh_values(c);
}

}  // namespace gangline
