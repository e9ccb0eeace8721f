#include "row_store.hpp"

#include <cstring>
#include <stdexcept>

#include "kernels.hpp"
#include "threads.hpp"

namespace gangline {

Dtype parse_dtype(const std::string& name) {
    if (name == "f32") return Dtype::f32;
    if (name == "bf16") return Dtype::bf16;
    if (name == "f16") return Dtype::f16;
    throw std::invalid_argument("the native core does not know the dtype '" + name + "'; use f32, bf16 or f16");
}

std::size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

void widen(const void* x, Dtype dtype, float* y, int count) {
    const RowOps& rows = kernels().rows;
    switch (dtype) {
        case Dtype::f32: std::memcpy(y, x, sizeof(float) * static_cast<std::size_t>(count)); return;
        case Dtype::bf16: return rows.widen_bf16(static_cast<const std::uint16_t*>(x), y, count);
        case Dtype::f16: return rows.widen_f16(static_cast<const std::uint16_t*>(x), y, count);
    }
}

void narrow(const float* x, Dtype dtype, void* y, int count) {
    const RowOps& rows = kernels().rows;
    switch (dtype) {
        case Dtype::f32: std::memcpy(y, x, sizeof(float) * static_cast<std::size_t>(count)); return;
        case Dtype::bf16: return rows.narrow_bf16(x, static_cast<std::uint16_t*>(y), count);
        case Dtype::f16: return rows.narrow_f16(x, static_cast<std::uint16_t*>(y), count);
    }
}

void KeptRows::want(int rows, int cols, int group) {
    cols_ = cols;
    group_ = group;
    padded_ = padded_cols(cols, group);
    const std::size_t values = static_cast<std::size_t>(rows) * static_cast<std::size_t>(padded_);
    if (group == 0) {
        x_.want(values);
        return;
    }
    q_.want(values);
    scale_.want(values / static_cast<std::size_t>(group));
    sum_.want(values / static_cast<std::size_t>(group));
}

void KeptRows::put(int row, int col_begin, const float* x, int count) {
    const std::ptrdiff_t at = std::ptrdiff_t{row} * padded_ + col_begin;
    if (group_ == 0) {
        std::memcpy(x_.data() + at, x, sizeof(float) * static_cast<std::size_t>(count));
        return;
    }
    kernels().quantize_rows(x, count, 1, count, group_, padded_cols(count, group_), q_.data() + at,
                            scale_.data() + at / group_, sum_.data() + at / group_);
}

void KeptRows::copy_row(int row, const KeptRows& from, int from_row) {
    const std::ptrdiff_t to = std::ptrdiff_t{row} * padded_;
    const std::ptrdiff_t at = std::ptrdiff_t{from_row} * padded_;
    const std::size_t values = static_cast<std::size_t>(padded_);
    if (group_ == 0) {
        std::memcpy(x_.data() + to, from.x_.data() + at, sizeof(float) * values);
        return;
    }
    const std::size_t groups = values / static_cast<std::size_t>(group_);
    std::memcpy(q_.data() + to, from.q_.data() + at, values);
    std::memcpy(scale_.data() + to / group_, from.scale_.data() + at / group_, sizeof(float) * groups);
    std::memcpy(sum_.data() + to / group_, from.sum_.data() + at / group_, sizeof(std::int32_t) * groups);
}

Activations KeptRows::view(int row, int count) const {
    Activations view;
    view.stride = padded_;
    view.tokens = count;
    view.cols = cols_;
    view.group = group_;
    view.padded = padded_;
    const std::ptrdiff_t at = std::ptrdiff_t{row} * padded_;
    if (group_ == 0) {
        view.x = x_.data() + at;
        return view;
    }
    view.q = q_.data() + at;
    view.scale = scale_.data() + at / group_;
    view.sum = sum_.data() + at / group_;
    return view;
}

void PairRows::plan(const RowSource& source, int pair_begin, int pair_end, int group, bool contiguous, bool keep,
                    int workers) {
    const int pairs = pair_end - pair_begin;
    filled_ = keep && by_token_;
    source_ = source;
    begin_ = pair_begin;
    end_ = pair_end;
    group_ = group;
    by_token_ = by_token(source.tokens, pairs);
    filled_ = filled_ && by_token_;
    copies_ = by_token_ && contiguous && source.token_of_pair != nullptr;
    if (!reads_in_place() && by_token_) tokens_.want(source.tokens, source.cols, group);
    if (!by_token_ || copies_) pairs_.want(pairs, source.cols, group);
    converted_.want(static_cast<std::size_t>(workers) * static_cast<std::size_t>(source.cols));
}

std::size_t PairRows::bytes(int tokens, int pairs, int cols, int group, int workers) {
    const std::size_t rows = static_cast<std::size_t>(pairs) + static_cast<std::size_t>(by_token(tokens, pairs) ? tokens : 0);
    return rows * kept_row_bytes(cols, group) + static_cast<std::size_t>(workers) * static_cast<std::size_t>(cols) * sizeof(float);
}

void PairRows::fill(int worker, int workers) {
    if (filled()) return;
    const std::size_t row_bytes = static_cast<std::size_t>(source_.cols) * dtype_bytes(source_.dtype);
    const auto* x = static_cast<const std::uint8_t*>(source_.x);
    float* converted = converted_.data() + static_cast<std::size_t>(worker) * static_cast<std::size_t>(source_.cols);
    const Range part = share(by_token_ ? source_.tokens : end_ - begin_, 1, worker, workers);
    for (int row = part.begin; row < part.end; ++row) {
        const std::int64_t from = by_token_ ? row : token(begin_ + row);
        const void* at = x + static_cast<std::size_t>(from) * row_bytes;
        const float* values = static_cast<const float*>(at);
        if (source_.dtype != Dtype::f32) {
            widen(at, source_.dtype, converted, source_.cols);
            values = converted;
        }
        (by_token_ ? tokens_ : pairs_).put(row, 0, values, source_.cols);
    }
}

void PairRows::fill_single() {
    if (!by_token_ || source_.tokens != 1) return;
    fill(0, 1);
    filled_ = true;
}

void PairRows::copy(int worker, int workers) {
    if (!copies_) return;
    const Range part = share(end_ - begin_, 1, worker, workers);
    for (int row = part.begin; row < part.end; ++row) {
        const int from = static_cast<int>(token(begin_ + row));
        if (reads_in_place()) {
            pairs_.put(row, 0, static_cast<const float*>(source_.x) + std::ptrdiff_t{from} * source_.cols, source_.cols);
        } else {
            pairs_.copy_row(row, tokens_, from);
        }
    }
}

Activations PairRows::view(int pair, int count) const {
    if (!by_token_ || copies_) return pairs_.view(pair - begin_, count);
    const int row = static_cast<int>(token(pair));
    if (!reads_in_place()) return tokens_.view(row, count);
    Activations view;
    view.x = static_cast<const float*>(source_.x) + std::ptrdiff_t{row} * source_.cols;
    view.stride = view.padded = view.cols = source_.cols;
    view.tokens = count;
    return view;
}

}  // namespace gangline
