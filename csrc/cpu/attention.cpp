#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "kernels.hpp"

namespace gangline {
namespace {

// The version that belongs to the table of kernels in use.
AttendChunk attention_in_use() {
    const std::string_view name = kernels().name;
    AttendChunk chosen = nullptr;
    if (name.starts_with("avx512")) chosen = avx512_attention();
    else if (name.starts_with("avx")) chosen = avx2_attention();
    else if (name == "neon") chosen = neon_attention();
    return chosen != nullptr ? chosen : scalar_attention();
}

}  // namespace

void attend(const AttentionChunk& chunk) { attention_in_use()(chunk); }

Attended::Attended(float* out, int head_dim, const float* sink)
    : out_(out),
      head_dim_(head_dim),
      top_(sink != nullptr ? *sink : -std::numeric_limits<float>::infinity()),
      total_(sink != nullptr ? 1.0f : 0.0f) {
    std::fill_n(out, head_dim, 0.0f);
}

void Attended::add(const float* acc, float max, float sum) {
    const float top = std::max(top_, max);
    const float keep = std::exp(top_ - top), weight = std::exp(max - top);
    top_ = top;
    total_ = total_ * keep + weight * sum;
    for (int d = 0; d < head_dim_; ++d) out_[d] = out_[d] * keep + weight * acc[d];
}

void Attended::finish() {
    const float inverse = 1.0f / total_;
    for (int d = 0; d < head_dim_; ++d) out_[d] *= inverse;
}

}  // namespace gangline
