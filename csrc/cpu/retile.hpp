// ggml blocks into 16-row tiles without a change of any weight: the same codes and scales in another order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gangline {

struct RetileJob {
    const std::uint8_t* blocks = nullptr;
    std::uint8_t* tiles = nullptr;
    int rows = 0;
    int cols = 0;  // a multiple of 32
};

// Throws std::invalid_argument where the blocks ("ggml:Q4_0", "ggml:Q8_0", "ggml:MXFP4") have no tile form.
// False where tiles cannot hold a scale (an exponent of 255); the tiles are then undefined.
bool retile(const std::string& codec, const RetileJob& job);

// The same on the calling thread alone, and the tiles may take the place of the blocks: they may begin where those do, or up
// to 64 bytes before. That needs tiles as large as the blocks: rows a multiple of 16 and no padding between stripes.
bool retile_in_place(const std::string& codec, const RetileJob& job);

}  // namespace gangline
