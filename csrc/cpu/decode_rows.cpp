#include "decode_rows.hpp"

#include <algorithm>
#include <cmath>

#include "kernels.hpp"
#include "threads.hpp"

namespace gangline {
namespace {

constexpr int row_block = 16;
// Rows that a worker takes at a time, in blocks: long enough to be read in one stream, short enough to end together.
constexpr int most_blocks = 12;
constexpr int tasks_per_worker = 8;

void finish(const Product& p, int begin, int end) {
    for (int t = 0; t < p.rows; ++t) {
        float* y = p.y + t * p.y_stride;
        if (const float* bias = p.linear->bias)
            for (int r = begin; r < end; ++r) y[r] += bias[r];
        if (p.residual == nullptr) continue;
        float* out = p.residual + t * p.y_stride;
        const float scale = p.gate != nullptr ? 1.0f / (1.0f + std::exp(-p.gate[t])) : 1.0f;
        for (int r = begin; r < end; ++r) out[r] += scale * y[r];
    }
}

}  // namespace

void ActivationRows::set_columns(int columns) {
    columns_ = columns;
    stride_ = (columns + row_block - 1) / row_block * row_block;
}

void ActivationRows::add_reader(const Matrix& w) {
    if (!needs_int8_activations(w.format)) return;
    const int group = activation_group(w);
    for (const Form& form : forms_)
        if (form.group == group && form.columns == w.cols) return;
    Form form;
    form.group = group;
    form.columns = w.cols;
    form.padded = (w.cols + group - 1) / group * group;
    forms_.push_back(std::move(form));
}

void ActivationRows::set_rows(int rows) {
    x_.want(static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride_));
    for (Form& form : forms_) {
        form.q.resize(static_cast<std::size_t>(rows) * static_cast<std::size_t>(form.padded));
        form.scale.resize(form.q.size() / static_cast<std::size_t>(form.group));
        form.sum.resize(form.scale.size());
    }
}

void ActivationRows::release() {
    x_.free();
    for (Form& form : forms_) {
        form.q = {};
        form.scale = {};
        form.sum = {};
    }
}

std::size_t ActivationRows::row_bytes() const {
    std::size_t bytes = static_cast<std::size_t>(stride_) * sizeof(float);
    for (const Form& form : forms_)
        bytes += static_cast<std::size_t>(form.padded + form.padded / form.group * 8);
    return bytes;
}

void ActivationRows::quantize(int t, int block_index, int columns) {
    const int begin = block_index * block;
    const int count = std::min(block, columns - begin);
    for (Form& form : forms_) {
        if (form.columns != columns) continue;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * form.padded + begin;
        const std::ptrdiff_t group_at = at / form.group;
        kernels().quantize_rows(row(t) + begin, stride_, 1, count, form.group, std::min(block, form.padded - begin),
                                form.q.data() + at, form.scale.data() + group_at, form.sum.data() + group_at);
    }
}

Activations ActivationRows::as(const Matrix& w, int rows) const {
    Activations a;
    a.x = x_.data();
    a.stride = stride_;
    a.tokens = rows;
    a.cols = w.cols;
    if (!needs_int8_activations(w.format)) return a;
    for (const Form& form : forms_) {
        if (form.group != activation_group(w) || form.columns != w.cols) continue;
        a.group = form.group;
        a.padded = form.padded;
        a.q = form.q.data();
        a.scale = form.scale.data();
        a.sum = form.sum.data();
    }
    return a;
}

void multiply(const Product* products, int count, Team team, TaskRanges& ranges) {
    const auto blocks = [](const Product& p) { return (p.linear->matrix.rows + row_block - 1) / row_block; };
    int total = 0;
    for (int i = 0; i < count; ++i) total += blocks(products[i]);
    // Even, because the tiles of sparse matrices have 32 rows as a rule.
    const int step = std::clamp(total / (team.workers * tasks_per_worker) / 2 * 2, 2, most_blocks);
    const int tasks = (total + step - 1) / step;
    for (int task; (task = ranges.take(tasks, team.worker, team.workers)) >= 0;) {
        const int from = task * step, to = std::min(from + step, total);
        int first = 0;  // block number of the product's first row
        for (int i = 0; i < count && first < to; ++i) {
            const Product& p = products[i];
            const Matrix& w = p.linear->matrix;
            const int begin = std::max(from - first, 0) * row_block;
            const int end = std::min(std::min(to - first, blocks(p)) * row_block, w.rows);
            first += blocks(p);
            if (begin >= end) continue;
            kernels().matmul[static_cast<int>(w.format)](w, begin, end, p.x->as(w, p.rows), p.y, p.y_stride);
            finish(p, begin, end);
        }
    }
}

}  // namespace gangline
