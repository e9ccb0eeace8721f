// Rounds a matrix of plain numbers into 16-row tiles: clip search, codes and layout exactly as the torch codecs do it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.hpp"

namespace gangline {

// Steps of the code grid onto which the largest magnitude (with zero points: the range) of a group is laid: without clipping
// anything, and those tried after it, in this order.
struct ClipSteps {
    float plain = 0.0F;
    int count = 0;
    float tried[48] = {};
};

struct EncodeJob {
    const void* weights = nullptr;
    Format number = Format::f32;       // f32, f16 or bf16
    std::ptrdiff_t row_stride = 0;     // numbers from row to row and from column to column; one of them is 1
    std::ptrdiff_t column_stride = 1;
    Matrix tiles;                      // where they go; its bytes are written
    ClipSteps steps;                   // filled in by encode(); integer formats
};

// Encodes the row blocks [begin, end). False where the format cannot hold a weight: nan, infinite, or past its scales.
using EncodeBlocks = bool (*)(const EncodeJob& job, int begin, int end);

bool encode_blocks_scalar(const EncodeJob& job, int begin, int end);
bool encode_blocks_avx2(const EncodeJob& job, int begin, int end);    // x86-64 only, as the next
bool encode_blocks_avx512(const EncodeJob& job, int begin, int end);

// The whole matrix, on all threads, with the instructions that kernels() uses. False as above; the bytes are then undefined.
bool encode(EncodeJob job);

}  // namespace gangline
