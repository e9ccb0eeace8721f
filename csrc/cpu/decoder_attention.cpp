// Attention inside the step: what a row's queries and keys go through, and who computes which part of it.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decoder_parts.hpp"
#include "norm_rope.hpp"
#include "threads.hpp"

namespace gangline {
namespace {

// Queries that go through the cache together: enough to convert keys once for many, few enough to stay in the caches.
constexpr int tile_queries = 32;

// Memory of one worker for some queries of one key/value head.
struct Room {
    std::vector<float> floats;
    std::vector<int> ints;
    std::vector<Attended> merged;
    float *q, *head, *wide, *scores, *acc, *max, *sum;
    int *begin, *end;

    void want(int queries, int head_dim) {
        const std::ptrdiff_t row = std::ptrdiff_t{queries} * head_dim;
        floats.resize(size(2 * row + (1 + kWideKeys) * std::ptrdiff_t{head_dim} + queries * (kScoreStride + 2)));
        q = floats.data();
        head = q + row;
        wide = head + head_dim;
        scores = wide + std::ptrdiff_t{kWideKeys} * head_dim;
        acc = scores + std::ptrdiff_t{queries} * kScoreStride;
        max = acc + row;
        sum = max + queries;
        ints.resize(size(2 * queries));
        begin = ints.data();
        end = begin + queries;
    }
};

Room& room_of_worker() {
    static thread_local Room room;
    return room;
}

AttentionChunk chunk_in(const Room& room, const AttentionSpec& a, Format numbers, int queries) {
    AttentionChunk chunk;
    chunk.q = room.q;
    chunk.format = numbers;
    chunk.queries = queries;
    chunk.head_dim = a.head_dim;
    chunk.begin = room.begin;
    chunk.end = room.end;
    chunk.scaling = a.scaling;
    chunk.scores = room.scores;
    chunk.wide = room.wide;
    chunk.acc = room.acc;
    chunk.max = room.max;
    chunk.sum = room.sum;
    return chunk;
}

}  // namespace

Decoder::AllHeads Decoder::all_heads(const std::optional<Norm>& norm, const float* x, int width, int head_dim) {
    AllHeads heads{x, norm ? &*norm : nullptr, norm && norm->size != head_dim, 0.0f};
    if (heads.together) heads.inverse = inverse_rms(x, width, norm->eps);
    return heads;
}

// One head of the queries or keys of a row: norm, clipping, rotation. `out` may be where it lies.
void Decoder::prepare_head(const AttentionSpec& a, const AllHeads& heads, int head, int row, float* out) const {
    const int n = a.head_dim;
    const float* x = heads.x + std::ptrdiff_t{head} * n;
    if (heads.norm != nullptr) {
        const float inverse = heads.together ? heads.inverse : inverse_rms(x, n, heads.norm->eps);
        scale_by_norm(*heads.norm, x, inverse, heads.together ? head * n : 0, n, out);
    } else if (x != out) {
        std::copy_n(x, n, out);
    }
    if (std::isfinite(a.clip)) clip(out, n, a.clip);
    const std::size_t half = spec_.inverse_frequencies.size();
    rotate(out, cosine_.data() + size(row) * half, sine_.data() + size(row) * half, static_cast<int>(half));
}

const char* Decoder::cached(const void* cache, int layer, int sequence, int head, int position) const {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const std::int64_t row = (std::int64_t{sequence} * a.kv_heads + head) * step_.cache[size(layer)].capacity + position;
    return static_cast<const char*>(cache) + row * a.head_dim * (spec_.numbers == Format::f32 ? 4 : 2);
}

// Key and value of one head of a row enter the cache; `k` are the row's keys, behind which its values lie.
void Decoder::store_new(int layer, int row, int head, const AllHeads& k, float* room) const {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const CacheRows& cache = step_.cache[size(layer)];
    const int n = a.head_dim, sequence = row / step_.tokens, position = step_.length + row % step_.tokens;
    const float* v = k.x + a.k.matrix.rows + std::ptrdiff_t{head} * n;
    prepare_head(a, k, head, row, room);
    write_numbers(room, n, spec_.numbers, const_cast<char*>(cached(cache.keys, layer, sequence, head, position)));
    std::copy_n(v, n, room);
    if (std::isfinite(a.clip)) clip(room, n, a.clip);
    write_numbers(room, n, spec_.numbers, const_cast<char*>(cached(cache.values, layer, sequence, head, position)));
}

Decoder::Piece Decoder::piece_at(const Cut& cut, Rows block, int kv_heads, int index) const {
    index += cut.before[size(block.begin)] * kv_heads;
    Piece piece;
    piece.row = block.begin;
    while (index >= cut.before[size(piece.row) + 1] * kv_heads) ++piece.row;
    const std::size_t row = size(piece.row);
    const Sight& seen = cut.sight[row];
    const int inside = index - cut.before[row] * kv_heads, chunks = cut.before[row + 1] - cut.before[row];
    piece.head = inside / chunks;
    const int from = seen.anchor + (seen.first_chunk() + inside % chunks) * kAttentionChunk;
    piece.begin = std::max(seen.begin, from);
    piece.end = std::min(seen.end, from + kAttentionChunk);
    piece.newest = inside % chunks + 1 == chunks;
    return piece;
}

void Decoder::attend_pieces(int layer, Rows block, Team team) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const Cut& cut = cuts_[size(cut_of_layer_[size(layer)])];
    const int group = a.heads / a.kv_heads, first = cut.before[size(block.begin)];
    Room& room = room_of_worker();
    room.want(group, a.head_dim);
    const int count = (cut.before[size(block.begin + block.count)] - first) * a.kv_heads;
    const Range mine = share(count, 1, team.worker, team.workers);
    int row = -1, head = -1;
    AllHeads q, k;
    for (int i = mine.begin; i < mine.end; ++i) {
        const Piece piece = piece_at(cut, block, a.kv_heads, i);
        if (piece.row != row) {
            const float* x = qkv_.data() + std::ptrdiff_t{piece.row - block.begin} * qkv_width(a);
            q = all_heads(a.q_norm, x, a.q.matrix.rows, a.head_dim);
            k = all_heads(a.k_norm, x + a.q.matrix.rows, a.k.matrix.rows, a.head_dim);
        }
        if (piece.row != row || piece.head != head)
            for (int g = 0; g < group; ++g) prepare_head(a, q, piece.head * group + g, piece.row, room.q + g * a.head_dim);
        row = piece.row;
        head = piece.head;
        if (piece.newest) store_new(layer, row, head, k, room.head);
        attend_piece(layer, piece, first * a.kv_heads + i);
    }
    barrier();
    merge(layer, block, team);
    barrier();
}

void Decoder::attend_piece(int layer, const Piece& piece, int index) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const CacheRows& cache = step_.cache[size(layer)];
    const int group = a.heads / a.kv_heads;
    Room& room = room_of_worker();
    std::fill_n(room.begin, group, 0);
    std::fill_n(room.end, group, piece.end - piece.begin);
    AttentionChunk chunk = chunk_in(room, a, spec_.numbers, group);
    chunk.keys = cached(cache.keys, layer, piece.row, piece.head, piece.begin);
    chunk.values = cached(cache.values, layer, piece.row, piece.head, piece.begin);
    chunk.acc = partial_.data() + std::ptrdiff_t{index} * group * a.head_dim;
    chunk.max = partial_max_.data() + std::ptrdiff_t{index} * group;
    chunk.sum = partial_sum_.data() + std::ptrdiff_t{index} * group;
    attend(chunk);
}

// attended_ = the chunks of every head, merged in ascending order, with its int8 forms.
void Decoder::merge(int layer, Rows block, Team team) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    // Whole heads that are whole blocks of the int8 forms.
    const int heads = ActivationRows::block / std::gcd(ActivationRows::block, a.head_dim);
    const int parts = (a.heads + heads - 1) / heads, blocks = heads * a.head_dim / ActivationRows::block;
    const Range mine = share(block.count * parts, 1, team.worker, team.workers);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int t = i / parts, part = i % parts;
        for (int h = part * heads; h < std::min((part + 1) * heads, a.heads); ++h) merge_head(layer, block, t, h);
        for (int b = part * blocks; b < std::min((part + 1) * blocks, attended_.blocks()); ++b)
            attended_.quantize(t, b, attended_.columns());
    }
}

void Decoder::merge_head(int layer, Rows block, int t, int head) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const Cut& cut = cuts_[size(cut_of_layer_[size(layer)])];
    const int group = a.heads / a.kv_heads, n = a.head_dim;
    const std::size_t row = size(block.begin + t);
    const int chunks = cut.before[row + 1] - cut.before[row];
    const std::ptrdiff_t first = std::ptrdiff_t{cut.before[row]} * a.kv_heads + head / group * chunks;
    Attended attended(attended_.row(t) + std::ptrdiff_t{head} * n, n, a.sinks != nullptr ? a.sinks + head : nullptr);
    for (int c = 0; c < chunks; ++c) {
        const std::ptrdiff_t slot = (first + c) * group + head % group;
        attended.add(partial_.data() + slot * n, partial_max_.data()[slot], partial_sum_.data()[slot]);
    }
    attended.finish();
}

// Keys and values of a block enter the cache.
void Decoder::store_rows(int layer, Rows block, Team team) const {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    Room& room = room_of_worker();
    room.want(1, a.head_dim);
    const Range mine = share(block.count, 1, team.worker, team.workers);
    for (int t = mine.begin; t < mine.end; ++t) {
        const float* x = qkv_.data() + std::ptrdiff_t{t} * qkv_width(a) + a.q.matrix.rows;
        const AllHeads k = all_heads(a.k_norm, x, a.k.matrix.rows, a.head_dim);
        for (int h = 0; h < a.kv_heads; ++h) store_new(layer, block.begin + t, h, k, room.head);
    }
}

// Queries of a block are made ready where they lie.
void Decoder::prepare_queries(int layer, Rows block, Team team) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const Range mine = share(block.count, 1, team.worker, team.workers);
    for (int t = mine.begin; t < mine.end; ++t) {
        float* x = qkv_.data() + std::ptrdiff_t{t} * qkv_width(a);
        const AllHeads q = all_heads(a.q_norm, x, a.q.matrix.rows, a.head_dim);
        for (int h = 0; h < a.heads; ++h) prepare_head(a, q, h, block.begin + t, x + std::ptrdiff_t{h} * a.head_dim);
    }
}

// Of one sequence's tokens in a block: padding by itself, the others some at a time.
int Decoder::tiles_of(Rows block, int sequence, int tile_tokens) const {
    const Tile all = tokens_of(block, sequence);
    const int padding = padding_of(all), seen = all.end - all.begin - padding;
    return padding + (seen + tile_tokens - 1) / tile_tokens;
}

Decoder::Tile Decoder::tokens_of(Rows block, int sequence) const {
    const int from = block.begin - sequence * step_.tokens;
    return {sequence, std::max(0, from), std::min(step_.tokens, from + block.count)};
}

int Decoder::padding_of(const Tile& tokens) const {
    const int first = static_cast<int>(step_.first[tokens.sequence]) - step_.length;
    return std::clamp(first - tokens.begin, 0, tokens.end - tokens.begin);
}

Decoder::Tile Decoder::tile_at(Rows block, int tile_tokens, int index) const {
    int sequence = block.begin / step_.tokens;
    for (int tiles; index >= (tiles = tiles_of(block, sequence, tile_tokens)); ++sequence) index -= tiles;
    Tile tile = tokens_of(block, sequence);
    const int padding = padding_of(tile);
    if (index < padding) return {sequence, tile.begin + index, tile.begin + index + 1};
    tile.begin += padding + (index - padding) * tile_tokens;
    tile.end = std::min(tile.end, tile.begin + tile_tokens);
    return tile;
}

void Decoder::attend_tiles(int layer, Rows block, Team team) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const int tile_tokens = std::max(1, tile_queries / (a.heads / a.kv_heads));
    store_rows(layer, block, team);
    prepare_queries(layer, block, team);
    barrier();
    int tiles = 0;
    for (int s = block.begin / step_.tokens; s <= (block.begin + block.count - 1) / step_.tokens; ++s)
        tiles += tiles_of(block, s, tile_tokens);
    // Neighbours in time share keys and values; the longest come first.
    for (int i = next_tile_.fetch_add(1); i < tiles * a.kv_heads; i = next_tile_.fetch_add(1))
        attend_tile(layer, block, tile_at(block, tile_tokens, tiles - 1 - i % tiles), i / tiles);
    barrier();
    if (team.worker == 0) next_tile_.store(0, std::memory_order_relaxed);
    const int blocks = attended_.blocks();
    const Range mine = share(block.count * blocks, 1, team.worker, team.workers);
    for (int i = mine.begin; i < mine.end; ++i) attended_.quantize(i / blocks, i % blocks, attended_.columns());
    barrier();
}

void Decoder::attend_tile(int layer, Rows block, const Tile& tile, int head) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const CacheRows& cache = step_.cache[size(layer)];
    const int group = a.heads / a.kv_heads, n = a.head_dim;
    const int queries = (tile.end - tile.begin) * group, row = tile.sequence * step_.tokens - block.begin;
    Room& room = room_of_worker();
    room.want(queries, n);
    room.merged.clear();
    for (int i = 0; i < queries; ++i) {
        const int t = row + tile.begin + i / group, h = head * group + i % group;
        std::copy_n(qkv_.data() + std::ptrdiff_t{t} * qkv_width(a) + std::ptrdiff_t{h} * n, n, room.q + std::ptrdiff_t{i} * n);
        room.merged.emplace_back(attended_.row(t) + std::ptrdiff_t{h} * n, n, a.sinks != nullptr ? a.sinks + h : nullptr);
    }
    // All tokens of a tile count chunks from one anchor. The first sees farthest back, the last farthest on.
    const Sight first = sight(tile.sequence, step_.length + tile.begin, a.window);
    const Sight last = sight(tile.sequence, step_.length + tile.end - 1, a.window);
    AttentionChunk chunk = chunk_in(room, a, spec_.numbers, queries);
    for (int c = first.first_chunk(); c <= last.last_chunk(); ++c) {
        const int from = first.anchor + c * kAttentionChunk;
        for (int i = 0; i < queries; ++i) {
            const Sight seen = sight(tile.sequence, step_.length + tile.begin + i / group, a.window);
            room.begin[i] = std::clamp(seen.begin - from, 0, kAttentionChunk);
            room.end[i] = std::clamp(seen.end - from, 0, kAttentionChunk);
        }
        chunk.keys = cached(cache.keys, layer, tile.sequence, head, from);
        chunk.values = cached(cache.values, layer, tile.sequence, head, from);
        attend(chunk);
        for (int i = 0; i < queries; ++i)
            if (room.begin[i] < room.end[i]) room.merged[size(i)].add(room.acc + std::ptrdiff_t{i} * n, room.max[i], room.sum[i]);
    }
    for (Attended& one : room.merged) one.finish();
}

}  // namespace gangline
