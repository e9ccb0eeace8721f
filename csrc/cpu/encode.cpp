#include "encode.hpp"

#include <algorithm>
#include <atomic>
#include <string_view>

#include "kernels.hpp"
#include "threads.hpp"
#include "tile_layout.hpp"

namespace gangline {
namespace {

EncodeBlocks encode_blocks() {
#if defined(__x86_64__) || defined(_M_X64)
    const std::string_view name = kernels().name;
    if (name.starts_with("avx512")) return encode_blocks_avx512;
    if (name.starts_with("avx")) return encode_blocks_avx2;
#endif
    return encode_blocks_scalar;
}

// As _shrunk() and search_scale() in formats/clip.py: ranges shrunk by 1/50 up to 39/50, and for symmetric codes those that
// put the largest weight exactly on the last code.
ClipSteps clip_steps(const Matrix& m) {
    constexpr int grid = 50, shrunk = 39;
    const double levels = (1 << code_bits(m.format)) - 1, plain = m.has_zeros ? levels : levels / 2;
    ClipSteps steps;
    steps.plain = static_cast<float>(plain);
    for (int i = 1; i <= shrunk; ++i) {
        steps.tried[steps.count++] = static_cast<float>(plain / (1 - static_cast<double>(i) / grid));
    }
    if (!m.has_zeros) {
        steps.tried[steps.count++] = static_cast<float>(plain + 0.5);
        steps.tried[steps.count++] = static_cast<float>(plain - 0.5);
    }
    std::sort(steps.tried, steps.tried + steps.count);
    return steps;
}

}  // namespace

bool encode(EncodeJob job) {
    if (job.tiles.format != Format::tile_mxfp4) job.steps = clip_steps(job.tiles);
    const EncodeBlocks blocks = encode_blocks();
    const int count = (job.tiles.rows + tile_rows - 1) / tile_rows;
    std::atomic<bool> held{true};
    parallel([&](int worker, int workers) {
        const Range part = share(count, 1, worker, workers);
        if (!blocks(job, part.begin, part.end)) held.store(false, std::memory_order_relaxed);
    });
    return held.load();
}

}  // namespace gangline
