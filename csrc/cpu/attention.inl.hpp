// attend() of attention.hpp, for the instruction set of the including file.
//
// A score is the sum of a vector of partial sums, lane by lane over the head's dimensions, whose lanes are added in one fixed
// order. A sum of values runs over the positions in ascending order. Both are the same whatever is computed beside them.
#pragma once

#include <algorithm>
#include <utility>

#include "attention.hpp"
#include "vec.inl.hpp"

namespace gangline {
namespace {

struct F32Numbers {
    static constexpr int size = 4;
    static Vec load(const std::uint8_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
};
struct F16Numbers {
    static constexpr int size = 2;
    static Vec load(const std::uint8_t* p) { return Vec::load_f16(p); }
};
struct Bf16Numbers {
    static constexpr int size = 2;
    static Vec load(const std::uint8_t* p) { return Vec::load_bf16(p); }
};

// The last `count` numbers of a row, the rest of the vector zero.
template <class Numbers>
inline Vec load_row_part(const std::uint8_t* p, int count) {
    std::uint8_t part[Vec::width * Numbers::size] = {};
    std::memcpy(part, p, static_cast<std::size_t>(count) * Numbers::size);
    return Numbers::load(part);
}

template <class Function, int... I>
inline void unroll(Function function, std::integer_sequence<int, I...>) {
    (function(std::integral_constant<int, I>{}), ...);
}
// Calls function(0), ..., function(N - 1) with numbers that the compiler knows, so that arrays stay in registers.
template <int N, class Function>
inline void unroll(Function function) {
    unroll(function, std::make_integer_sequence<int, N>{});
}

// Lane i of the result: the sum of the lanes of v[i].
#if !defined(GANGLINE_SCALAR) && defined(__AVX512F__)

inline __m512 halves(__m512 a, __m512 b) {  // within 128 bits: a0 + a2, b0 + b2, a1 + a3, b1 + b3
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline __m512 quarters(__m512 ab, __m512 cd) {  // within 128 bits: sums of a, b, c, d
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
inline __m512 pairs_of_four(__m512 p, __m512 q) {  // of 128-bit parts: p0 + p1, p2 + p3, q0 + q1, q2 + q3
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
}
inline Vec lane_sums(const Vec* v) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i)
        four[i] = quarters(halves(v[4 * i].v, v[4 * i + 1].v), halves(v[4 * i + 2].v, v[4 * i + 3].v));
    return {pairs_of_four(pairs_of_four(four[0], four[1]), pairs_of_four(four[2], four[3]))};
}

#elif !defined(GANGLINE_SCALAR) && defined(__AVX2__)

inline __m256 halves(__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
inline __m256 quarters(__m256 ab, __m256 cd) {
    const __m256d x = _mm256_castps_pd(ab), y = _mm256_castps_pd(cd);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
inline Vec lane_sums(const Vec* v) {
    const __m256 p = quarters(halves(v[0].v, v[1].v), halves(v[2].v, v[3].v));
    const __m256 q = quarters(halves(v[4].v, v[5].v), halves(v[6].v, v[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(p, q, 0x20), _mm256_permute2f128_ps(p, q, 0x31))};
}

#elif !defined(GANGLINE_SCALAR) && defined(__ARM_NEON)

inline Vec lane_sums(const Vec* v) {
    return {vpaddq_f32(vpaddq_f32(v[0].v, v[1].v), vpaddq_f32(v[2].v, v[3].v))};
}

#else

inline Vec lane_sums(const Vec* v) {
    return Vec::each([&](int i) { return v[i].sum(); });
}

#endif

// Scores that are computed together: keys times queries.
constexpr int held_scores = Vec::width == 16 ? 16 : 8;

// `Q` queries from `q` on with as many keys as there are places; key k of query i goes to scores[i * kScoreStride + k].
template <class Numbers, int Q>
inline void score_tile(const std::uint8_t* keys, const float* q, int head_dim, float* scores) {
    constexpr int K = held_scores / Q;
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{head_dim} * Numbers::size;
    const int whole = head_dim / Vec::width * Vec::width;
    Vec acc[held_scores];
    for (int i = 0; i < held_scores; ++i) acc[i] = Vec::zero();
    if constexpr (Q == 1) {
        // Keys one after another: the processor by itself fetches a single stream ahead best.
        unroll<K>([&](auto k) {
            const std::uint8_t* at = keys + k * row_bytes;
            for (int d = 0; d < whole; d += Vec::width, at += Vec::width * Numbers::size) {
                acc[k] = fma(Numbers::load(at), Vec::load(q + d), acc[k]);
            }
        });
    } else {
        for (int d = 0; d < whole; d += Vec::width) {
            const std::uint8_t* at = keys + d * Numbers::size;
            Vec query[Q];
            for (int i = 0; i < Q; ++i) query[i] = Vec::load(q + std::ptrdiff_t{i} * head_dim + d);
            for (int k = 0; k < K; ++k) {
                const Vec key = Numbers::load(at + k * row_bytes);
                for (int i = 0; i < Q; ++i) acc[i * K + k] = fma(key, query[i], acc[i * K + k]);
            }
        }
    }
    if (whole < head_dim) {
        const int count = head_dim - whole;
        for (int i = 0; i < Q; ++i) {
            const Vec query = load_part(q + std::ptrdiff_t{i} * head_dim + whole, count);
            for (int k = 0; k < K; ++k) {
                const Vec key = load_row_part<Numbers>(keys + whole * Numbers::size + k * row_bytes, count);
                acc[i * K + k] = fma(key, query, acc[i * K + k]);
            }
        }
    }
    float sums[held_scores];
    for (int i = 0; i < held_scores; i += Vec::width) lane_sums(acc + i).store(sums + i);
    for (int i = 0; i < Q; ++i)
        std::memcpy(scores + std::ptrdiff_t{i} * kScoreStride, sums + i * K, static_cast<std::size_t>(K) * sizeof(float));
}

// Keys [from, from + count) of the chunk, which begin at `keys`, for `Q` queries. Rows up to the next multiple of held_scores
// are read.
template <class Numbers, int Q>
inline void score_queries(const AttentionChunk& c, const std::uint8_t* keys, int query, int from, int count) {
    constexpr int K = held_scores / Q;
    int begin = c.begin[query], end = c.end[query];
    for (int i = 1; i < Q; ++i) {
        begin = std::min(begin, c.begin[query + i]);
        end = std::max(end, c.end[query + i]);
    }
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{c.head_dim} * Numbers::size;
    const float* q = c.q + std::ptrdiff_t{query} * c.head_dim;
    float* scores = c.scores + std::ptrdiff_t{query} * kScoreStride;
    for (int k = 0; k < count; k += K) {
        if (from + k >= end || from + k + K <= begin) continue;
        score_tile<Numbers, Q>(keys + k * row_bytes, q, c.head_dim, scores + from + k);
    }
}

template <class Numbers>
inline void score_keys(const AttentionChunk& c, const std::uint8_t* keys, int from, int count) {
    int query = 0;
    for (; query + 4 <= c.queries; query += 4) score_queries<Numbers, 4>(c, keys, query, from, count);
    for (; query + 2 <= c.queries; query += 2) score_queries<Numbers, 2>(c, keys, query, from, count);
    for (; query < c.queries; ++query) score_queries<Numbers, 1>(c, keys, query, from, count);
}

// `count` rows as fp32, one behind another.
template <class Numbers>
inline void widen(const std::uint8_t* rows, int count, int head_dim, float* wide) {
    const int total = count * head_dim;
    int i = 0;
    for (; i + Vec::width <= total; i += Vec::width) Numbers::load(rows + i * Numbers::size).store(wide + i);
    if (i < total) store_part(load_row_part<Numbers>(rows + i * Numbers::size, total - i), wide + i, total - i);
}

// From so many queries on, keys are worth being converted once for all of them.
constexpr int many_queries = 8;

template <class Numbers>
void score_chunk(const AttentionChunk& c, int begin, int end) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{c.head_dim} * Numbers::size;
    const auto* keys = static_cast<const std::uint8_t*>(c.keys);
    int from = begin;
    if (c.queries < many_queries) {
        for (; from + held_scores <= end; from += held_scores) {
            score_keys<Numbers>(c, keys + from * row_bytes, from, held_scores);
        }
    }
    for (; from < end; from += kWideKeys) {
        const int count = std::min(kWideKeys, end - from);
        widen<Numbers>(keys + from * row_bytes, count, c.head_dim, c.wide);
        score_keys<F32Numbers>(c, reinterpret_cast<const std::uint8_t*>(c.wide), from, count);
    }
}

inline float largest(const float* s, int n) {
    int i = Vec::width <= n ? Vec::width : 0;
    float top = s[0];
    if (i > 0) {
        Vec lanes = Vec::load(s);
        for (; i + Vec::width <= n; i += Vec::width) lanes = max(lanes, Vec::load(s + i));
        float lane[Vec::width];
        lanes.store(lane);
        for (const float value : lane) top = value > top ? value : top;
    }
    for (; i < n; ++i) top = s[i] > top ? s[i] : top;
    return top;
}

// Scores of one query become exp(scaling * (score - max)); returns their sum. The last vector may reach beyond `n`; what
// lies there does not count.
inline float soften(float* s, int n, float scaling, float top) {
    const Vec scale = Vec::all(scaling), shift = Vec::all(top);
    Vec total = Vec::zero();
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) {
        const Vec e = exponential((Vec::load(s + i) - shift) * scale);
        e.store(s + i);
        total = total + e;
    }
    if (i < n) {
        exponential((load_part(s + i, n - i) - shift) * scale).store(s + i);
        total = total + load_part(s + i, n - i);
    }
    return total.sum();
}

// `H` queries, `C` vectors of columns beginning at `column`. Positions that all of them see are read once.
template <class Numbers, int H, int C>
inline void sum_block(const AttentionChunk& c, int query, int column) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{c.head_dim} * Numbers::size;
    const std::uint8_t* values = static_cast<const std::uint8_t*>(c.values) + std::ptrdiff_t{column} * Numbers::size;
    const float* weights = c.scores + std::ptrdiff_t{query} * kScoreStride;
    const int* begin = c.begin + query;
    const int* end = c.end + query;
    const int all_begin = *std::max_element(begin, begin + H);
    const int all_end = std::max(all_begin, *std::min_element(end, end + H));
    Vec acc[H][C];
    for (int h = 0; h < H; ++h)
        for (int i = 0; i < C; ++i) acc[h][i] = Vec::zero();
    const auto alone = [&](auto h, int from, int to) {
        for (int p = from; p < to; ++p) {
            const Vec weight = Vec::all(weights[h * kScoreStride + p]);
            for (int i = 0; i < C; ++i)
                acc[h][i] = fma(weight, Numbers::load(values + p * row_bytes + i * Vec::width * Numbers::size), acc[h][i]);
        }
    };
    unroll<H>([&](auto h) { alone(h, begin[h], std::min(end[h], all_begin)); });
    const std::uint8_t* at = values + all_begin * row_bytes;
    for (int p = all_begin; p < all_end; ++p, at += row_bytes) {
        Vec value[C];
        for (int i = 0; i < C; ++i) value[i] = Numbers::load(at + i * Vec::width * Numbers::size);
        for (int h = 0; h < H; ++h) {
            const Vec weight = Vec::all(weights[h * kScoreStride + p]);
            for (int i = 0; i < C; ++i) acc[h][i] = fma(weight, value[i], acc[h][i]);
        }
    }
    unroll<H>([&](auto h) { alone(h, all_end, end[h]); });
    for (int h = 0; h < H; ++h)
        for (int i = 0; i < C; ++i) acc[h][i].store(c.acc + (query + h) * std::ptrdiff_t{c.head_dim} + column + i * Vec::width);
}

// Columns that are no whole vector, one query after another.
template <class Numbers>
inline void sum_rest(const AttentionChunk& c, int query, int column) {
    const std::ptrdiff_t row_bytes = std::ptrdiff_t{c.head_dim} * Numbers::size;
    const int count = c.head_dim - column;
    const auto* values = static_cast<const std::uint8_t*>(c.values) + std::ptrdiff_t{column} * Numbers::size;
    Vec acc = Vec::zero();
    for (int p = c.begin[query]; p < c.end[query]; ++p)
        acc = fma(Vec::all(c.scores[query * kScoreStride + p]), load_row_part<Numbers>(values + p * row_bytes, count), acc);
    store_part(acc, c.acc + query * std::ptrdiff_t{c.head_dim} + column, count);
}

// Sums that are held in registers: half of the 32 or 16 there are.
constexpr int held_sums = Vec::width == 8 ? 8 : 16;

template <class Numbers, int H>
inline void sum_queries(const AttentionChunk& c, int query) {
    constexpr int C = held_sums / H < 8 ? held_sums / H : 8;
    int column = 0;
    for (; column + C * Vec::width <= c.head_dim; column += C * Vec::width) sum_block<Numbers, H, C>(c, query, column);
    for (; column + Vec::width <= c.head_dim; column += Vec::width) sum_block<Numbers, H, 1>(c, query, column);
    for (int h = 0; column < c.head_dim && h < H; ++h) sum_rest<Numbers>(c, query + h, column);
}

template <class Numbers>
void attend_numbers(const AttentionChunk& c) {
    int begin = kAttentionChunk, end = 0;
    for (int i = 0; i < c.queries; ++i) {
        if (c.begin[i] >= c.end[i]) continue;
        begin = std::min(begin, c.begin[i]);
        end = std::max(end, c.end[i]);
    }
    score_chunk<Numbers>(c, begin, end);
    for (int i = 0; i < c.queries; ++i) {
        float* scores = c.scores + i * kScoreStride + c.begin[i];
        const int count = c.end[i] - c.begin[i];
        if (count <= 0) continue;
        const float top = largest(scores, count);
        c.sum[i] = soften(scores, count, c.scaling, top);
        c.max[i] = top * c.scaling;
    }
    int query = 0;
    for (; query + 4 <= c.queries; query += 4) sum_queries<Numbers, 4>(c, query);
    for (; query + 2 <= c.queries; query += 2) sum_queries<Numbers, 2>(c, query);
    for (; query < c.queries; ++query) sum_queries<Numbers, 1>(c, query);
}

void attend_chunk(const AttentionChunk& c) {
    switch (c.format) {
        case Format::bf16: return attend_numbers<Bf16Numbers>(c);
        case Format::f16: return attend_numbers<F16Numbers>(c);
        default: return attend_numbers<F32Numbers>(c);
    }
}

}  // namespace
}  // namespace gangline
