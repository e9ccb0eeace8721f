#include "routing.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace gangline {
namespace {

void softmax(const float* z, int n, float* y) {
    const float top = *std::max_element(z, z + n);
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum += y[i] = std::exp(z[i] - top);
    for (int i = 0; i < n; ++i) y[i] /= sum;
}

void sigmoid(const float* z, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = 1.0f / (1.0f + std::exp(-z[i]));
}

void score_classes(const RouterRule& rule, const float* z, float* score) {
    switch (rule.score) {
        case Score::softmax: return softmax(z, rule.classes, score);
        case Score::sigmoid: return sigmoid(z, rule.classes, score);
        case Score::softmax_topk: std::copy_n(z, rule.classes, score);
    }
}

float group_score(const RouterRule& rule, const float* choice, int size) {
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (int i = 0; i < size; ++i) {
        if (choice[i] > best) {
            second = best;
            best = choice[i];
        } else if (choice[i] > second) {
            second = choice[i];
        }
    }
    return rule.group_by_top2 ? best + second : best;
}

// Overwrites the choice scores outside the best groups.
void limit_groups(const RouterRule& rule, float* choice) {
    constexpr int most = 64;
    const int size = rule.classes / rule.groups;
    float score[most];
    bool kept[most] = {};
    for (int g = 0; g < rule.groups; ++g) score[g] = group_score(rule, choice + g * size, size);
    for (int n = 0; n < rule.keep; ++n) {
        int best = -1;
        for (int g = 0; g < rule.groups; ++g)
            if (!kept[g] && (best < 0 || score[g] > score[best])) best = g;
        kept[best] = true;
    }
    for (int g = 0; g < rule.groups; ++g)
        if (!kept[g]) std::fill_n(choice + g * size, size, rule.group_fill);
}

void take_best(int k, int classes, const float* choice, std::int64_t* ids) {
    for (int n = 0; n < k; ++n) {
        int best = -1;
        for (int i = 0; i < classes; ++i) {
            if (best >= 0 && !(choice[i] > choice[best])) continue;
            if (std::find(ids, ids + n, i) == ids + n) best = i;
        }
        ids[n] = best;
    }
}

}  // namespace

void route(const RouterRule& rule, const float* logits, float* scratch, std::int64_t* ids, float* weights) {
    float* score = scratch;
    float* choice = scratch + rule.classes;
    score_classes(rule, logits, score);
    std::copy_n(rule.choose_by_logit ? logits : score, rule.classes, choice);
    if (rule.bias != nullptr)
        for (int i = 0; i < rule.classes; ++i) choice[i] += rule.bias[i];
    if (rule.groups > 0) limit_groups(rule, choice);
    take_best(rule.k, rule.classes, choice, ids);
    for (int n = 0; n < rule.k; ++n) weights[n] = score[ids[n]];
    if (rule.score == Score::softmax_topk) softmax(weights, rule.k, weights);
    if (rule.normalise) {
        float sum = 0.0f;
        for (int n = 0; n < rule.k; ++n) sum += weights[n];
        sum = std::max(sum, rule.norm_min) + rule.norm_eps;
        for (int n = 0; n < rule.k; ++n) weights[n] /= sum;
    }
    for (int n = 0; n < rule.k; ++n) {
        if (rule.expert_scale != nullptr) weights[n] *= rule.expert_scale[ids[n]];
        weights[n] *= rule.scale;
    }
}

void score_row(const float* logits, int classes, bool by_sigmoid, float* score) {
    if (by_sigmoid) sigmoid(logits, classes, score);
    else softmax(logits, classes, score);
}

void rank_row(const float* score, int classes, int* order) {
    std::iota(order, order + classes, 0);
    std::stable_sort(order, order + classes, [score](int a, int b) { return score[a] > score[b]; });
}

}  // namespace gangline
