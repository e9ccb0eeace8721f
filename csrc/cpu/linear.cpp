#include "linear.hpp"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "threads.hpp"

namespace gangline {
namespace {

constexpr int fewest_rows = 32;
constexpr int most_rows = 2 * streamed_rows;
constexpr int tasks_per_worker = 8;

// Rows of a matrix that one task takes: enough tasks to keep workers level, large enough to stream.
int rows_of_task(int rows, int workers) {
    if (rows < 2 * workers * streamed_rows) return std::max(fewest_rows, std::min(most_rows, rows / (2 * workers) / 16 * 16));
    const int strides = rows / (workers * tasks_per_worker) / streamed_rows;
    return std::clamp(strides * streamed_rows, streamed_rows, most_rows);
}

}  // namespace

void check_products(const ProductsCall& call) {
    for (int i = 0; i < call.count; ++i) {
        const Matrix& w = *call.matrices[i];
        const Matrix& one = *call.matrices[0];
        if (w.cols != call.x.cols || w.rows != one.rows || w.format != one.format || w.group != one.group ||
            w.byte_scales != one.byte_scales) {
            throw std::invalid_argument("matrix " + std::to_string(i) + " does not fit rows of " +
                                        std::to_string(call.x.cols) + " values, or is unlike the first");
        }
        if (kernels().matmul[static_cast<int>(w.format)] == nullptr) {
            throw std::invalid_argument(std::string("the kernels '") + kernels().name + "' do not have a matrix's format");
        }
    }
}

void ProductsRun::prepare(const ProductsCall& call, int workers) {
    call_ = call;
    slab_begin_ = slab_end_ = 0;
    const Matrix& one = *call.matrices[0];
    group_ = needs_int8_activations(one.format) ? activation_group(one) : 0;
    rows_of_task_ = rows_of_task(one.rows * std::min(call.count, tasks_per_worker), workers);
    rooms_.want(static_cast<std::size_t>(workers) * block_tokens * most_rows);
    plan_slab(workers);
}

void ProductsRun::plan_slab(int workers) {
    const int pairs = call_.starts[call_.count];
    slab_begin_ = slab_end_;
    slab_end_ = std::min(pairs, slab_begin_ + slab_pairs);
    const int chunks = (call_.matrices[0]->rows + rows_of_task_ - 1) / rows_of_task_;
    tasks_ = cut_into_tasks(call_.starts, call_.count, slab_begin_, slab_end_, chunks, segments_);
    const bool contiguous = std::any_of(segments_.begin(), segments_.end(),
                                        [](const Segment& s) { return s.pair_end - s.pair_begin > 1; });
    rows_.plan(call_.x, slab_begin_, slab_end_, group_, contiguous, slab_begin_ > 0, workers);
    next_.store(0, std::memory_order_relaxed);
}

void ProductsRun::work(const ProductsCall& call, int worker, int workers) {
    if (call.count == 0 || call.starts[call.count] == 0) return;
    if (worker == 0) prepare(call, workers);
    barrier();
    const int pairs = call_.starts[call_.count];
    float* room = rooms_.data() + static_cast<std::size_t>(worker) * block_tokens * most_rows;
    for (;;) {
        rows_.fill(worker, workers);
        barrier();
        if (rows_.copies()) {
            rows_.copy(worker, workers);
            barrier();
        }
        const Segment* segment = segments_.data();
        for (int at = next_.fetch_add(1); at < tasks_; at = next_.fetch_add(1)) {
            while (segment < &segments_.back() && segment[1].first_task <= at) ++segment;
            const int blocks = (segment->pair_end - segment->pair_begin + block_tokens - 1) / block_tokens;
            const int local = at - segment->first_task;
            task(*segment, local / blocks, local % blocks, room);
        }
        if (slab_end_ == pairs) return;
        barrier();
        if (worker == 0) plan_slab(workers);
        barrier();
    }
}

void ProductsRun::task(const Segment& segment, int chunk, int block, float* room) {
    const Matrix& w = *call_.matrices[segment.expert];
    const int begin = chunk * rows_of_task_;
    const int end = std::min(begin + rows_of_task_, w.rows);
    const int pair = segment.pair_begin + block * block_tokens;
    const int tokens = std::min(block_tokens, segment.pair_end - pair);
    kernels().matmul[static_cast<int>(w.format)](w, begin, end, rows_.view(pair, tokens), room - begin, most_rows);
    const std::size_t size = dtype_bytes(call_.y_dtype);
    for (int t = 0; t < tokens; ++t) {
        float* values = room + t * most_rows;
        if (call_.bias != nullptr) {
            for (int i = begin; i < end; ++i) values[i - begin] += call_.bias[i];
        }
        const std::size_t at = static_cast<std::size_t>((pair + t) * call_.y_stride + begin);
        narrow(values, call_.y_dtype, static_cast<std::uint8_t*>(call_.y) + at * size, end - begin);
    }
}

void grouped_products(const ProductsCall& call) {
    static std::mutex one_caller;
    static ProductsRun run;
    check_products(call);
    const std::lock_guard<std::mutex> lock(one_caller);
    parallel([&call](int worker, int workers) { run.work(call, worker, workers); });
}

namespace {

constexpr int combine_columns = 512;

// The pairs of each token, in ascending order: first[t] to first[t + 1] of `pairs`.
struct PairsOfTokens {
    Buffer<int> first, pairs;

    void sort(const CombineCall& call) {
        int* begin = first.want(static_cast<std::size_t>(call.tokens) + 2);
        int* sorted = pairs.want(static_cast<std::size_t>(call.pairs));
        std::fill(begin, begin + call.tokens + 2, 0);
        // Counted two places on, so that placing each pair leaves every token's beginning where it belongs.
        for (int p = 0; p < call.pairs; ++p) ++begin[call.token_of_pair[p] + 2];
        for (int t = 0; t < call.tokens; ++t) begin[t + 2] += begin[t + 1];
        for (int p = 0; p < call.pairs; ++p) sorted[begin[call.token_of_pair[p] + 1]++] = p;
    }
};

void combine_part(const CombineCall& call, const PairsOfTokens& sorted, int token, int col_begin, int count) {
    const int first = sorted.first.data()[token], last = sorted.first.data()[token + 1];
    if (call.accumulate && first == last) return;
    float sum[combine_columns] = {};
    if (call.accumulate) {
        const float* before = static_cast<const float*>(call.out) + std::ptrdiff_t{token} * call.hidden + col_begin;
        std::copy(before, before + count, sum);
    }
    for (int i = first; i < last; ++i) {
        const int pair = sorted.pairs.data()[i];
        const float* y = call.y + std::ptrdiff_t{pair} * call.hidden + col_begin;
        kernels().rows.accumulate(call.weights[pair], y, sum, count);
    }
    const std::size_t at = static_cast<std::size_t>(token) * static_cast<std::size_t>(call.hidden) +
                           static_cast<std::size_t>(col_begin);
    narrow(sum, call.out_dtype, static_cast<std::uint8_t*>(call.out) + at * dtype_bytes(call.out_dtype), count);
}

}  // namespace

void combine(const CombineCall& call) {
    for (int p = 0; p < call.pairs; ++p) {
        if (call.token_of_pair[p] < 0 || call.token_of_pair[p] >= call.tokens) {
            throw std::invalid_argument("pair " + std::to_string(p) + " belongs to token " +
                                        std::to_string(call.token_of_pair[p]) + ", but there are " +
                                        std::to_string(call.tokens));
        }
    }
    if (call.accumulate && call.out_dtype != Dtype::f32) {
        throw std::invalid_argument("sums can go on only in fp32");
    }
    static std::mutex one_caller;
    static PairsOfTokens sorted;
    const std::lock_guard<std::mutex> lock(one_caller);
    sorted.sort(call);
    const int pieces = (call.hidden + combine_columns - 1) / combine_columns;
    const auto add = [&](int worker, int workers) {
        const Range part = share(call.tokens * pieces, 1, worker, workers);
        for (int i = part.begin; i < part.end; ++i) {
            const int begin = i % pieces * combine_columns;
            combine_part(call, sorted, i / pieces, begin, std::min(combine_columns, call.hidden - begin));
        }
    };
    constexpr int few = 64;  // sums of pairs for which waking the others takes longer
    if (call.pairs * pieces <= few) add(0, 1);
    else parallel(add);
}

}  // namespace gangline
