// Rows of activations on their way into matrix products: read in any dtype, kept as fp32 or as int8 groups.
#pragma once

#include <cstdint>
#include <string>

#include "buffer.hpp"
#include "matrix.hpp"

namespace gangline {

enum class Dtype : int { f32, bf16, f16 };

// "f32", "bf16" or "f16"; throws std::invalid_argument for any other.
Dtype parse_dtype(const std::string& name);
std::size_t dtype_bytes(Dtype dtype);
void widen(const void* x, Dtype dtype, float* y, int count);
void narrow(const float* x, Dtype dtype, void* y, int count);

// `tokens` contiguous rows of `cols` values; pair p reads row token_of_pair[p], or row p if that is null.
struct RowSource {
    const void* x = nullptr;
    Dtype dtype = Dtype::f32;
    int tokens = 0;
    int cols = 0;
    const std::int64_t* token_of_pair = nullptr;
};

// Columns of the int8 form: whole groups. group 0 (fp32 rows) pads nothing.
constexpr int padded_cols(int cols, int group) { return group == 0 ? cols : (cols + group - 1) / group * group; }

// Bytes that one kept row takes.
constexpr std::size_t kept_row_bytes(int cols, int group) {
    const std::size_t padded = static_cast<std::size_t>(padded_cols(cols, group));
    return group == 0 ? padded * sizeof(float)
                      : padded + padded / static_cast<std::size_t>(group) * (sizeof(float) + sizeof(std::int32_t));
}

// Kept rows: fp32 where group is 0, int8 groups otherwise.
class KeptRows {
public:
    void want(int rows, int cols, int group);
    // Stores columns [col_begin, col_begin + count) of a row; col_begin is a multiple of the group.
    void put(int row, int col_begin, const float* x, int count);
    void copy_row(int row, const KeptRows& from, int from_row);
    Activations view(int row, int count) const;

private:
    int cols_ = 0, group_ = 0, padded_ = 0;
    Buffer<float> x_;
    Buffer<std::int8_t> q_;
    Buffer<float> scale_;
    Buffer<std::int32_t> sum_;
};

// The rows that a range of pairs needs, so that neighbouring pairs are neighbouring rows. Each token is converted and
// rounded once, then copied to its pairs; where pairs are fewer than tokens, pairs are converted instead.
class PairRows {
public:
    // Alone, before fill(). `contiguous`: some view() will span several pairs. `keep`: the tokens filled last time are the
    // same ones.
    void plan(const RowSource& source, int pair_begin, int pair_end, int group, bool contiguous, bool keep, int workers);
    // By all workers, then a barrier; not needed where filled() says so.
    void fill(int worker, int workers);
    // Alone, after plan(): one token is not worth a meeting.
    void fill_single();
    bool filled() const { return by_token_ && (filled_ || reads_in_place()); }
    // By all workers, then a barrier; not needed, and nothing to be done, where copies() is false.
    bool copies() const { return copies_; }
    void copy(int worker, int workers);
    // Rows of pairs [pair, pair + count).
    Activations view(int pair, int count) const;

    // Whether so many tokens and pairs are converted token by token; and the bytes that this takes.
    static bool by_token(int tokens, int pairs) { return tokens <= pairs; }
    static std::size_t bytes(int tokens, int pairs, int cols, int group, int workers);

private:
    bool reads_in_place() const { return group_ == 0 && source_.dtype == Dtype::f32; }
    std::int64_t token(int pair) const { return source_.token_of_pair ? source_.token_of_pair[pair] : pair; }

    RowSource source_;
    int begin_ = 0, end_ = 0, group_ = 0;
    bool by_token_ = true, copies_ = false, filled_ = false;
    KeptRows tokens_, pairs_;
    Buffer<float> converted_;  // one row for each worker
};

}  // namespace gangline
