// The decode step with every expert in memory: the experts of a layer between its halves, in the same parallel call.

#include <algorithm>
#include <stdexcept>

#include "decoder.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace gangline {
namespace {

// Pairs that are computed together at most: two for each row of the step, as many as the memory plan counts.
int pairs_of_run(int rows) { return std::clamp(2 * rows, 512, 4096); }

}  // namespace

void Decoder::set_experts(std::vector<LayerExperts> experts) {
    if (experts.empty()) {
        experts_.clear();
        return;
    }
    std::vector<LayerExperts> by_layer(spec_.layers.size());
    std::size_t next = 0;
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
        if (!spec_.layers[l].router) continue;
        if (next == experts.size()) throw std::invalid_argument("experts of fewer layers than the model has");
        LayerExperts& given = experts[next++];
        if (given.layer.hidden != spec_.hidden || static_cast<int>(given.experts.size()) != spec_.layers[l].rule.classes)
            throw std::invalid_argument("the experts do not fit their layer");
        std::vector<const Expert*> all;
        for (const Expert& expert : given.experts) all.push_back(&expert);
        ExpertsCall call;
        call.layer = &given.layer;
        call.experts = all.data();
        call.count = static_cast<int>(all.size());
        check_call(call);
        by_layer[l] = std::move(given);
    }
    if (next != experts.size()) throw std::invalid_argument("experts of more layers than the model has");
    experts_ = std::move(by_layer);
}

void Decoder::step_all() {
    if (experts_.empty()) throw std::logic_error("step_all() needs set_experts()");
    parallel([this](int worker, int workers) {
        const Team team{worker, workers};
        for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); ++layer) {
            front(layer, team, true);
            if (spec_.layers[static_cast<std::size_t>(layer)].router) experts(layer, team);
        }
        head(team);
    });
}

// The pairs of a layer, sorted by expert and, within one, by row.
void Decoder::group_pairs(int layer) {
    const std::size_t l = static_cast<std::size_t>(layer);
    const RouterRule& rule = spec_.layers[l].rule;
    const int k = rule.k, pairs = step_.rows() * k;
    const std::ptrdiff_t first = routed_before_[l] * step_.rows();
    const std::int64_t* ids = step_.ids + first;
    // Counted one place on, and placed by the count of the expert before: each then stands where the next begins.
    first_of_expert_.assign(static_cast<std::size_t>(rule.classes) + 1, 0);
    int* begin = first_of_expert_.data();
    for (int i = 0; i < pairs; ++i) ++begin[ids[i] + 1];
    for (int e = 0; e < rule.classes; ++e) begin[e + 1] += begin[e];
    order_.resize(static_cast<std::size_t>(pairs));
    for (int i = 0; i < pairs; ++i) order_[static_cast<std::size_t>(begin[ids[i]]++)] = i;
    for (int e = rule.classes; e > 0; --e) begin[e] = begin[e - 1];
    begin[0] = 0;
    row_of_pair_.resize(order_.size());
    weight_of_pair_.resize(order_.size());
    pairs_of_row_.resize(order_.size());
    filled_.assign(static_cast<std::size_t>(step_.rows()), 0);
    for (int p = 0; p < pairs; ++p) {
        const std::size_t at = static_cast<std::size_t>(p);
        const int flat = order_[at], row = flat / k;
        row_of_pair_[at] = row;
        weight_of_pair_[at] = step_.weights[first + flat];
        pairs_of_row_[static_cast<std::size_t>(row * k + filled_[static_cast<std::size_t>(row)]++)] = p;
    }
    run_end_ = next_expert_ = 0;
    if (!in_runs(k)) pair_output_.want(order_.size() * static_cast<std::size_t>(spec_.hidden));
}

// The next pairs that are computed together: those of whole experts if possible.
void Decoder::prepare_run(int layer, int workers) {
    const std::size_t l = static_cast<std::size_t>(layer);
    const int* begin = first_of_expert_.data();
    const int classes = spec_.layers[l].rule.classes;
    run_begin_ = run_end_;
    const int limit = std::min(begin[classes], run_begin_ + pairs_of_run(step_.rows()));
    starts_.clear();
    chosen_.clear();
    run_end_ = run_begin_;
    for (; next_expert_ < classes && run_end_ < limit; ++next_expert_) {
        const int from = std::max(begin[next_expert_], run_begin_), to = begin[next_expert_ + 1];
        if (from == to) continue;
        if (to > limit && run_end_ > run_begin_) break;
        starts_.push_back(from - run_begin_);
        chosen_.push_back(&experts_[l].experts[static_cast<std::size_t>(next_expert_)]);
        run_end_ = std::min(to, limit);
        if (to > limit) break;  // one expert by itself, which the next run goes on with
    }
    starts_.push_back(run_end_ - run_begin_);
    call_.layer = &experts_[l].layer;
    call_.x = {step_.moe_input, Dtype::f32, step_.rows(), spec_.hidden, row_of_pair_.data() + run_begin_};
    call_.starts = starts_.data();
    call_.experts = chosen_.data();
    call_.count = static_cast<int>(chosen_.size());
    const bool adds_up = in_runs(spec_.layers[l].rule.k);
    call_.y = adds_up ? nullptr : pair_output_.data();
    call_.weight_of_pair = weight_of_pair_.data() + run_begin_;
    call_.sum = adds_up ? sums_.data() : nullptr;
    run_.prepare(call_, workers);
}

// Whether a layer's pairs are too many for one run. Runs add their outputs up themselves.
bool Decoder::in_runs(int k) const { return step_.rows() * k > pairs_of_run(step_.rows()); }

// Sums are zero when a layer begins: each adds its own to x_ and leaves zeros for the next.
void Decoder::want_sums() {
    const auto takes_runs = [this](const DecoderLayer& l) { return l.router && in_runs(l.rule.k); };
    if (experts_.empty() || !std::any_of(spec_.layers.begin(), spec_.layers.end(), takes_runs)) return;
    const std::size_t count = static_cast<std::size_t>(step_.rows()) * static_cast<std::size_t>(spec_.hidden);
    std::fill_n(sums_.want(count), count, 0.0f);
}

void Decoder::experts(int layer, Team team) {
    const int k = spec_.layers[static_cast<std::size_t>(layer)].rule.k, pairs = step_.rows() * k;
    const bool adds_up = in_runs(k);
    for (int begin = 0; begin < pairs;) {
        if (team.worker == 0) {
            if (begin == 0) group_pairs(layer);
            prepare_run(layer, team.workers);
        }
        barrier();
        begin = run_end_;  // before the first worker prepares the next run
        run_.work_prepared(team.worker, team.workers);
        barrier();
    }
    constexpr int block = ActivationRows::block;
    const int blocks = (spec_.hidden + block - 1) / block;
    const Range mine = share(step_.rows() * blocks, 1, team.worker, team.workers);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int row = i / blocks, column = i % blocks * block, count = std::min(block, spec_.hidden - column);
        if (adds_up) {
            float* sum = sums_.data() + std::ptrdiff_t{row} * spec_.hidden + column;
            add_output(row, column, count, sum);
            std::fill_n(sum, count, 0.0f);
        } else {
            float sum[block] = {};
            add_pairs(k, row, column, count, sum);
            add_output(row, column, count, sum);
        }
    }
    barrier();
}

// Adds the outputs of a row's pairs, columns [column, column + count).
void Decoder::add_pairs(int k, int row, int column, int count, float* sum) const {
    for (int n = 0; n < k; ++n) {
        const int p = pairs_of_row_[static_cast<std::size_t>(row * k + n)];
        const float* y = pair_output_.data() + std::ptrdiff_t{p} * spec_.hidden + column;
        kernels().rows.accumulate(weight_of_pair_[static_cast<std::size_t>(p)], y, sum, count);
    }
}

}  // namespace gangline
