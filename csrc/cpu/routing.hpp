// From a router's logits to expert ids and weights: the common part of the families' rules (models/router.py has them all).
#pragma once

#include <cstdint>

namespace gangline {

enum class Score : int { softmax, sigmoid, softmax_topk };

struct RouterRule {
    int classes = 0;
    int k = 0;
    Score score = Score::softmax;
    bool choose_by_logit = false;
    const float* bias = nullptr;      // [classes], takes part in the choice only
    int groups = 0;                   // 0: no group limit; otherwise equal, contiguous groups
    int keep = 0;                     // groups kept
    bool group_by_top2 = false;       // a group's score: sum of its two best, or its best
    float group_fill = 0.0f;          // choice score of experts outside the kept groups
    bool normalise = false;           // divide by the sum of the chosen
    float norm_eps = 0.0f;
    float norm_min = 0.0f;
    float scale = 1.0f;
    const float* expert_scale = nullptr;  // [classes]
};

// ids and weights [k], best first. `scratch` holds 2 * classes floats.
void route(const RouterRule& rule, const float* logits, float* scratch, std::int64_t* ids, float* weights);

// Scores of all classes from logits, which they may replace.
void score_row(const float* logits, int classes, bool sigmoid, float* score);

// All classes, best first; equal ones by their number.
void rank_row(const float* score, int classes, int* order);

}  // namespace gangline
