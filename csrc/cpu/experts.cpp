#include "experts.hpp"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "threads.hpp"
#include "weights.hpp"

namespace gangline {
namespace {

// Rows of one task. With one token for each expert a task is over as soon as its weights are read, and the beginning of each
// stream costs time: tasks are twice as long where there are enough of them for all workers to end together.
int task_rows_of(const ExpertsCall& call, int workers) {
    constexpr int enough = 8;  // tasks of a worker
    const bool alone = call.starts[call.count] == call.count;
    const int tasks = call.count * (call.layer->intermediate / (2 * streamed_rows));
    return alone && tasks >= enough * workers ? 2 * streamed_rows : streamed_rows;
}

// Columns of the sums that one task owns: few enough that all workers end together.
int sum_rows_of(int hidden, int workers, int most) { return std::clamp(hidden / (8 * workers) / 16 * 16, 32, most); }

// Rows of gate and up that one task takes: chunks of h end where a group of the down projection ends.
int gate_rows_of(int down_group, int rows) {
    const int unit = std::lcm(16, std::max(1, down_group));
    const int both = std::lcm(unit, rows);
    return both <= 2 * streamed_rows ? both : std::max(unit, (rows + unit - 1) / unit * unit);
}

int group_of(const Matrix& w) { return needs_int8_activations(w.format) ? activation_group(w) : 0; }

bool same_kind(const Matrix& a, const Matrix& b) {
    return a.rows == b.rows && a.cols == b.cols && a.format == b.format && a.group == b.group &&
           a.has_zeros == b.has_zeros && a.byte_scales == b.byte_scales;
}

void check_shape(const Matrix& w, int rows, int cols, const char* name) {
    if (w.rows != rows || w.cols != cols) {
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(w.rows) + " x " + std::to_string(w.cols) +
                                    ", but the layer needs " + std::to_string(rows) + " x " + std::to_string(cols));
    }
    if (kernels().matmul[static_cast<int>(w.format)] == nullptr) {
        throw std::invalid_argument(std::string("the kernels '") + kernels().name + "' do not have the format of " + name);
    }
}

void check_expert(const ExpertsLayer& layer, const Expert& expert) {
    const bool split = expert.second.data != nullptr;
    const int rows = layer.gate.gated && !split ? 2 * layer.intermediate : layer.intermediate;
    check_shape(expert.first, rows, layer.hidden, layer.gate.gated ? (split ? "gate" : "gate_up") : "up");
    check_shape(expert.down, layer.hidden, layer.intermediate, "down");
    if (split && !layer.gate.gated) throw std::invalid_argument("a layer without a gate has two matrices, not three");
    if (!split) return;
    check_shape(expert.second, layer.intermediate, layer.hidden, "up");
    if (group_of(expert.first) != group_of(expert.second)) {
        throw std::invalid_argument("gate and up need activations in the same groups");
    }
}

void add_row(const float* bias, float* y, int count) {
    for (int i = 0; i < count; ++i) y[i] += bias[i];
}

// Rows [begin, end) for all tokens of x into a buffer whose column 0 is the row `begin` rounded down to 16. Returns where
// the row `begin` lies.
float* products(const Matrix& w, int begin, int end, const Activations& x, float* buffer, std::ptrdiff_t stride) {
    const int aligned = begin / 16 * 16;
    const int stop = std::min(w.rows, (end + 15) / 16 * 16);
    kernels().matmul[static_cast<int>(w.format)](w, aligned, stop, x, buffer - aligned, stride);
    return buffer + (begin - aligned);
}

int blocks_of(const Segment& segment) {
    return (segment.pair_end - segment.pair_begin + block_tokens - 1) / block_tokens;
}

const Segment* segment_of(const std::vector<Segment>& segments, const Segment* from, int task) {
    const Segment* last = segments.data() + segments.size() - 1;
    if (task < from->first_task) from = segments.data();
    while (from < last && from[1].first_task <= task) ++from;
    return from;
}

}  // namespace

void check_call(const ExpertsCall& call) {
    if (call.count == 0) return;
    const Expert& one = *call.experts[0];
    check_expert(*call.layer, one);
    for (int i = 1; i < call.count; ++i) {
        const Expert& other = *call.experts[i];
        if (!same_kind(one.first, other.first) || !same_kind(one.down, other.down) ||
            !same_kind(one.second, other.second)) {
            throw std::invalid_argument("the experts of one call must have the same shapes and formats");
        }
    }
}

int cut_into_tasks(const int* starts, int count, int begin, int end, int chunks, std::vector<Segment>& segments) {
    segments.clear();
    int tasks = 0;
    for (int i = 0; i < count; ++i) {
        const int first = std::max(starts[i], begin);
        const int last = std::min(starts[i + 1], end);
        if (first >= last) continue;
        segments.push_back({i, first, last, tasks});
        tasks += chunks * blocks_of(segments.back());
    }
    return tasks;
}

void ExpertsRun::prepare(const ExpertsCall& call, int workers) {
    call_ = call;
    workers_ = workers;
    slab_begin_ = slab_end_ = 0;
    const Expert& one = *call.experts[0];
    first_group_ = group_of(one.first);
    down_group_ = group_of(one.down);
    const int rows = task_rows_of(call, workers);
    gate_rows_ = gate_rows_of(down_group_, rows);
    down_rows_ = 2 * rows;
    sum_rows_ = sum_rows_of(call.layer->hidden, workers, rows);
    room_ = block_tokens * 2 * (gate_rows_ + 32) + gate_rows_;
    rooms_.want(static_cast<std::size_t>(workers) * static_cast<std::size_t>(room_));
    gate_up_segments_.reserve(static_cast<std::size_t>(call.count));
    down_segments_.reserve(static_cast<std::size_t>(call.count));
    plan_slab(workers);
    rows_.fill_single();
}

void ExpertsRun::plan_slab(int workers) {
    const ExpertsLayer& layer = *call_.layer;
    const int pairs = call_.starts[call_.count];
    slab_begin_ = slab_end_;
    slab_end_ = std::min(pairs, slab_begin_ + slab_pairs);
    const auto pieces = [](int count, int size) { return (count + size - 1) / size; };
    gate_up_count_ = cut_into_tasks(call_.starts, call_.count, slab_begin_, slab_end_,
                                    pieces(layer.intermediate, gate_rows_), gate_up_segments_);
    down_count_ = cut_into_tasks(call_.starts, call_.count, slab_begin_, slab_end_, pieces(layer.hidden, down_rows_),
                                 down_segments_);
    const bool contiguous = std::any_of(gate_up_segments_.begin(), gate_up_segments_.end(),
                                        [](const Segment& s) { return s.pair_end - s.pair_begin > 1; });
    rows_.plan(call_.x, slab_begin_, slab_end_, first_group_, contiguous, slab_begin_ > 0, workers);
    h_.want(slab_end_ - slab_begin_, layer.intermediate, down_group_);
    if (call_.sum != nullptr) down_count_ = pieces(layer.hidden, sum_rows_);
    gate_up_tasks_.restart(workers);
    down_tasks_.restart(workers);
}

void ExpertsRun::work(const ExpertsCall& call, int worker, int workers) {
    if (call.count == 0) return;
    if (worker == 0) prepare(call, workers);
    barrier();
    work_prepared(worker, workers);
}

void ExpertsRun::work_prepared(int worker, int workers) {
    const int pairs = call_.starts[call_.count];
    for (;;) {
        if (!rows_.filled()) {
            rows_.fill(worker, workers);
            barrier();
        }
        if (rows_.copies()) {
            rows_.copy(worker, workers);
            barrier();
        }
        gate_up_tasks(worker);
        barrier();
        if (call_.sum != nullptr) sum_tasks(worker);
        else down_tasks(worker);
        if (slab_end_ == pairs) return;
        barrier();
        if (worker == 0) plan_slab(workers);
        barrier();
    }
}

void ExpertsRun::gate_up_tasks(int worker) {
    if (gate_up_count_ == 0) return;
    float* room = rooms_.data() + static_cast<std::size_t>(worker) * static_cast<std::size_t>(room_);
    const Segment* segment = gate_up_segments_.data();
    for (int task; (task = gate_up_tasks_.take(gate_up_count_, worker, workers_)) >= 0;) {
        segment = segment_of(gate_up_segments_, segment, task);
        gate_up_task(*segment, task, room);
    }
    // While others finish: what this worker will read first after the barrier.
    if (call_.sum == nullptr) prefetch_down(share(down_count_, 1, worker, workers_).begin);
}

void ExpertsRun::prefetch_gate_up(int task) const {
    if (task >= gate_up_count_) return;
    const Segment& segment = *segment_of(gate_up_segments_, gate_up_segments_.data(), task);
    const int row = (task - segment.first_task) / blocks_of(segment) * gate_rows_;
    const bool alternating = call_.layer->interleaved && call_.experts[segment.expert]->second.data == nullptr;
    prefetch_rows(call_.experts[segment.expert]->first, alternating ? 2 * row : row);
}

void ExpertsRun::prefetch_down(int task) const {
    if (task >= down_count_) return;
    const Segment& segment = *segment_of(down_segments_, down_segments_.data(), task);
    const int row = (task - segment.first_task) / blocks_of(segment) * down_rows_;
    prefetch_rows(call_.experts[segment.expert]->down, row);
}

void ExpertsRun::gate_up_task(const Segment& segment, int task, float* room) {
    const int blocks = blocks_of(segment), local = task - segment.first_task, chunk = local / blocks, block = local % blocks;
    const ExpertsLayer& layer = *call_.layer;
    const Expert& expert = *call_.experts[segment.expert];
    const bool split = expert.second.data != nullptr;
    const int intermediate = layer.intermediate;
    const int begin = chunk * gate_rows_;
    const int count = std::min(gate_rows_, intermediate - begin);
    const int pair = segment.pair_begin + block * block_tokens;
    const int tokens = std::min(block_tokens, segment.pair_end - pair);
    const std::ptrdiff_t stride = 2 * (gate_rows_ + 32);
    const Activations x = rows_.view(pair, tokens);

    const bool alternating = layer.gate.gated && !split && layer.interleaved;
    const int step = alternating ? 2 : 1;
    float* gate = nullptr;
    float* up = nullptr;
    if (alternating) {
        gate = products(expert.first, 2 * begin, 2 * (begin + count), x, room, stride);
        up = gate + 1;
    } else if (layer.gate.gated) {
        const int offset = split ? begin : intermediate + begin;
        prefetch_rows(split ? expert.second : expert.first, offset);
        gate = products(expert.first, begin, begin + count, x, room, stride);
        up = products(split ? expert.second : expert.first, offset, offset + count, x, room + gate_rows_ + 32, stride);
    } else {
        up = products(expert.first, begin, begin + count, x, room, stride);
    }

    prefetch_gate_up(task + 1);
    const float* bias = expert.gate_up_bias;
    const int bias_step = layer.gate.gated && layer.interleaved ? 2 : 1;
    const float* up_bias = bias;
    if (bias != nullptr && layer.gate.gated) up_bias = layer.interleaved ? bias + 1 : bias + intermediate;
    float* h = room + block_tokens * stride;
    for (int t = 0; t < tokens; ++t) {
        float* gate_t = gate == nullptr ? nullptr : gate + t * stride;
        float* up_t = up + t * stride;
        if (bias != nullptr) {
            for (int i = 0; i < count; ++i) {
                if (gate_t != nullptr) gate_t[i * step] += bias[(begin + i) * bias_step];
                up_t[i * step] += up_bias[(begin + i) * bias_step];
            }
        }
        kernels().rows.gate(layer.gate, gate_t, up_t, step, h, count);
        h_.put(pair - slab_begin_ + t, begin, h, count);
    }
}

void ExpertsRun::down_tasks(int worker) {
    if (down_count_ == 0) return;
    const Segment* segment = down_segments_.data();
    for (int task; (task = down_tasks_.take(down_count_, worker, workers_)) >= 0;) {
        segment = segment_of(down_segments_, segment, task);
        const int blocks = blocks_of(*segment), local = task - segment->first_task;
        prefetch_down(task + 1);
        down_task(*segment, local / blocks, local % blocks);
    }
}

void ExpertsRun::down_task(const Segment& segment, int chunk, int block) {
    const Expert& expert = *call_.experts[segment.expert];
    const int hidden = call_.layer->hidden;
    const int begin = chunk * down_rows_;
    const int end = std::min(begin + down_rows_, hidden);
    const int pair = segment.pair_begin + block * block_tokens;
    const int tokens = std::min(block_tokens, segment.pair_end - pair);
    float* y = call_.y + std::ptrdiff_t{pair} * hidden;
    const MatmulRows matmul = kernels().matmul[static_cast<int>(expert.down.format)];
    matmul(expert.down, begin, end, h_.view(pair - slab_begin_, tokens), y, hidden);
    if (expert.down_bias == nullptr) return;
    for (int t = 0; t < tokens; ++t) {
        add_row(expert.down_bias + begin, y + std::ptrdiff_t{t} * hidden + begin, end - begin);
    }
}

// A task owns some columns and goes through all experts, so that every sum is made by one worker and in order.
void ExpertsRun::sum_tasks(int worker) {
    const int hidden = call_.layer->hidden;
    float* room = rooms_.data() + static_cast<std::size_t>(worker) * static_cast<std::size_t>(room_);
    for (int task; (task = down_tasks_.take(down_count_, worker, workers_)) >= 0;) {
        const int begin = task * sum_rows_, end = std::min(begin + sum_rows_, hidden);
        for (const Segment& segment : down_segments_) {
            for (int pair = segment.pair_begin; pair < segment.pair_end; pair += block_tokens) {
                sum_block(segment, begin, end, pair, room);
            }
        }
    }
}

void ExpertsRun::sum_block(const Segment& segment, int begin, int end, int pair, float* room) {
    const Expert& expert = *call_.experts[segment.expert];
    const int hidden = call_.layer->hidden, count = end - begin;
    const int tokens = std::min(block_tokens, segment.pair_end - pair);
    const MatmulRows matmul = kernels().matmul[static_cast<int>(expert.down.format)];
    matmul(expert.down, begin, end, h_.view(pair - slab_begin_, tokens), room - begin, sum_rows_);
    for (int t = 0; t < tokens; ++t) {
        float* y = room + std::ptrdiff_t{t} * sum_rows_;
        if (expert.down_bias != nullptr) add_row(expert.down_bias + begin, y, count);
        const std::int64_t token = call_.x.token_of_pair[pair + t];
        kernels().rows.accumulate(call_.weight_of_pair[pair + t], y, call_.sum + token * hidden + begin, count);
    }
}

void experts_forward(const ExpertsCall& call) {
    static std::mutex one_caller;
    static ExpertsRun run;
    const std::lock_guard<std::mutex> lock(one_caller);
    check_call(call);
    parallel([&call](int worker, int workers) { run.work(call, worker, workers); });
}

std::size_t experts_scratch_bytes(const ExpertsLayer& layer, const Expert& expert, int tokens, int pairs, int workers) {
    const int slab = std::min(pairs, slab_pairs);
    const int group = group_of(expert.down);
    const int rows = std::max(gate_rows_of(group, streamed_rows), gate_rows_of(group, 2 * streamed_rows));
    const std::size_t room = static_cast<std::size_t>(block_tokens * 2 * (rows + 32) + rows) * sizeof(float);
    return PairRows::bytes(tokens, slab, layer.hidden, group_of(expert.first), workers) +
           static_cast<std::size_t>(slab) * kept_row_bytes(layer.intermediate, group_of(expert.down)) +
           static_cast<std::size_t>(workers) * room;
}

}  // namespace gangline
