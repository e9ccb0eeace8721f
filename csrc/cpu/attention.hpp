// Attention of some queries to a stretch of cached keys and values of one key/value head.
//
// A sequence's cache is cut into chunks of a fixed number of positions, counted from the first that is no padding. Chunks are
// computed apart and merged in ascending order. A query's result depends on itself and on what it sees alone: neither on the
// queries beside it, nor on the number of threads, nor on padding.
#pragma once

#include "matrix.hpp"

namespace gangline {

constexpr int kAttentionChunk = 256;
// Keys that are held as fp32 at a time, and floats from one query's scores to the next's: vectors may reach beyond a chunk.
constexpr int kWideKeys = 32;
constexpr int kScoreStride = kAttentionChunk + kWideKeys;

// Some queries against one chunk of the cache of their key/value head.
struct AttentionChunk {
    const float* q = nullptr;      // [queries, head_dim], rotated
    const void* keys = nullptr;    // [positions, head_dim], from the chunk's first position
    const void* values = nullptr;  // the same
    Format format = Format::f32;   // f32, f16 or bf16
    int queries = 0;
    int head_dim = 0;
    const int* begin = nullptr;    // [queries]: each sees positions [begin, end) of the chunk, perhaps none
    const int* end = nullptr;
    float scaling = 1.0f;
    float* scores = nullptr;       // scratch [queries, kScoreStride]
    float* wide = nullptr;         // scratch [kWideKeys, head_dim]
    // Results: of the chunk alone, to be merged. Those of queries that see nothing mean nothing.
    float* acc = nullptr;          // [queries, head_dim]: sum of exp(score - max) * value
    float* max = nullptr;          // [queries]
    float* sum = nullptr;          // [queries]: sum of exp(score - max)
};

// Fills in the results of a chunk.
void attend(const AttentionChunk& chunk);

// The chunks of one query so far, in ascending order.
struct Attended {
    // `out` [head_dim] is where the result will be. `sink`: a logit that takes part in the softmax only, or null.
    Attended(float* out, int head_dim, const float* sink);
    void add(const float* acc, float max, float sum);
    void finish();

private:
    float* out_;
    int head_dim_;
    float top_, total_;
};

// The instruction sets' versions of attend().
using AttendChunk = void (*)(const AttentionChunk& chunk);

AttendChunk scalar_attention();
AttendChunk avx2_attention();
AttendChunk avx512_attention();
AttendChunk neon_attention();

}  // namespace gangline
