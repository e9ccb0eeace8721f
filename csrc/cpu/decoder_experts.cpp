// The decode step with every expert in memory: the experts of a layer between its halves, in the same parallel call.

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "decoder.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace gangline {

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

void Decoder::group_pairs(int layer) {
    const std::size_t l = static_cast<std::size_t>(layer);
    const int k = spec_.layers[l].rule.k, pairs = step_.rows * k;
    const std::ptrdiff_t first = routed_before_[l] * step_.rows;
    const std::int64_t* ids = step_.ids + first;
    order_.resize(static_cast<std::size_t>(pairs));
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [ids](int a, int b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
    starts_.clear();
    chosen_.clear();
    row_of_pair_.clear();
    weight_of_pair_.clear();
    pairs_of_row_.assign(order_.size(), 0);
    filled_.assign(static_cast<std::size_t>(step_.rows), 0);
    for (int p = 0; p < pairs; ++p) {
        const int flat = order_[static_cast<std::size_t>(p)], row = flat / k;
        if (p == 0 || ids[flat] != ids[order_[static_cast<std::size_t>(p) - 1]]) {
            starts_.push_back(p);
            chosen_.push_back(&experts_[l].experts[static_cast<std::size_t>(ids[flat])]);
        }
        row_of_pair_.push_back(row);
        weight_of_pair_.push_back(step_.weights[first + flat]);
        pairs_of_row_[static_cast<std::size_t>(row * k + filled_[static_cast<std::size_t>(row)]++)] = p;
    }
    starts_.push_back(pairs);
    call_.layer = &experts_[l].layer;
    call_.x = {step_.moe_input, Dtype::f32, step_.rows, spec_.hidden, row_of_pair_.data()};
    call_.starts = starts_.data();
    call_.experts = chosen_.data();
    call_.count = static_cast<int>(chosen_.size());
    call_.y = pair_output_.want(static_cast<std::size_t>(pairs) * static_cast<std::size_t>(spec_.hidden));
}

void Decoder::experts(int layer, Team team) {
    if (team.worker == 0) {
        group_pairs(layer);
        run_.prepare(call_, team.workers);
    }
    barrier();
    run_.work_prepared(team.worker, team.workers);
    barrier();
    constexpr int block = ActivationRows::block;
    const int k = spec_.layers[static_cast<std::size_t>(layer)].rule.k;
    const int blocks = (spec_.hidden + block - 1) / block;
    const Range mine = share(step_.rows * blocks, 1, team.worker, team.workers);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int row = i / blocks, begin = i % blocks * block, count = std::min(block, spec_.hidden - begin);
        float sum[block] = {};
        for (int n = 0; n < k; ++n) {
            const int p = pairs_of_row_[static_cast<std::size_t>(row * k + n)];
            const float* y = call_.y + std::ptrdiff_t{p} * spec_.hidden + begin;
            kernels().rows.accumulate(weight_of_pair_[static_cast<std::size_t>(p)], y, sum, count);
        }
        add_output(layer, row, begin, count, sum);
    }
    barrier();
}

}  // namespace gangline
