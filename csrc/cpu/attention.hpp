// Attention of one token to a stretch of cached keys and values.
//
// A cache row is cut into chunks of a fixed number of positions, counted from the first that the token sees. Chunks are
// computed apart and merged in ascending order, so that a result depends neither on the number of threads nor on padding.
#pragma once

#include "matrix.hpp"

namespace gangline {

constexpr int kAttentionChunk = 256;

// The query heads of one group against one chunk of the cache of their key/value head.
struct AttentionChunk {
    const float* q = nullptr;      // [group, head_dim], rotated
    const void* keys = nullptr;    // [positions, head_dim], from the chunk's first position
    const void* values = nullptr;  // the same
    Format format = Format::f32;   // f32, f16 or bf16
    int group = 0;
    int head_dim = 0;
    int positions = 0;             // at most kAttentionChunk
    float scaling = 1.0f;
    float* scores = nullptr;       // scratch [group, kAttentionChunk]
    // Results: of the chunk alone, to be merged.
    float* acc = nullptr;          // [group, head_dim]: sum of exp(score - max) * value
    float* max = nullptr;          // [group]
    float* sum = nullptr;          // [group]: sum of exp(score - max)
};

// Fills in the results of a chunk.
void attend(const AttentionChunk& chunk);

// What attend() does once the scores (products of queries and keys) are there.
struct AttentionKernels {
    void (*weigh_values)(const AttentionChunk& chunk);
};

const AttentionKernels* scalar_attention();
const AttentionKernels* avx2_attention();
const AttentionKernels* avx512_attention();
const AttentionKernels* neon_attention();

}  // namespace gangline
