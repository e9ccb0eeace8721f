// The experts of one MoE layer: y = down(gate(gate_up(x))) for (token, expert) pairs sorted by expert.
//
// Work is cut into tasks of one expert, some rows of its matrices and some of its tokens; see task_ranges.hpp for who does what.
// No sum is ever cut, so results depend neither on the number of workers nor on what else is in the call.
#pragma once

#include <vector>

#include "gates.hpp"
#include "row_store.hpp"
#include "task_ranges.hpp"

namespace gangline {

struct ExpertsLayer {
    int hidden = 0;
    int intermediate = 0;
    Gate gate;
    bool interleaved = false;  // rows of gate_up, and its bias: g0, u0, g1, u1, ...
};

// Matrices of one expert; they own nothing. With a gate: gate_up in `first`, or gate in `first` and up in `second`
// (second.data not null). Without: up in `first`. Biases are fp32, in the module's order, or null.
struct Expert {
    Matrix first;
    Matrix second;
    Matrix down;
    const float* gate_up_bias = nullptr;
    const float* down_bias = nullptr;
};

// Pairs [starts[i], starts[i + 1]) belong to experts[i]. Their outputs go, not weighted, to y [pairs, hidden]; or, with `sum`
// [tokens, hidden], every pair adds its weight times its output to its token's row, in the order of the pairs. The sums have
// the bits that combine() gives, and no output has to go to memory and back. All is fp32.
struct ExpertsCall {
    const ExpertsLayer* layer = nullptr;
    RowSource x;
    const int* starts = nullptr;
    const Expert* const* experts = nullptr;
    int count = 0;
    float* y = nullptr;
    const float* weight_of_pair = nullptr;  // with `sum`
    float* sum = nullptr;
};

// Some rows of one expert's tokens, and where its tasks begin in the count of all.
struct Segment {
    int expert = 0;
    int pair_begin = 0;
    int pair_end = 0;
    int first_task = 0;
};

// Cuts the pairs of several experts into segments within [begin, end), and these into tasks: `chunks` pieces of matrix for
// each block of tokens. Returns the number of tasks.
int cut_into_tasks(const int* starts, int count, int begin, int end, int chunks, std::vector<Segment>& segments);

// Rows that a task reads in one stream: enough bytes that its beginning does not count, few enough to keep workers level.
constexpr int streamed_rows = 96;
// Tokens of one task: bounds the memory of a worker.
constexpr int block_tokens = 128;
// Pairs that are under way at a time: bounds the memory of a call. A longer call goes through its pairs in slabs.
constexpr int slab_pairs = 4096;

// Throws std::invalid_argument where the matrices do not fit the layer or each other, or the kernels in use lack a format.
void check_call(const ExpertsCall& call);

// Runs calls one after another on memory that it keeps.
class ExpertsRun {
public:
    // By all workers inside parallel(), with the same call, after check_call(). Results are complete when all have returned.
    void work(const ExpertsCall& call, int worker, int workers);
    // The same in two steps, for callers that have to meet in between anyway: by one worker, then, behind a barrier, by all.
    void prepare(const ExpertsCall& call, int workers);
    void work_prepared(int worker, int workers);

private:
    void plan_slab(int workers);
    void gate_up_tasks(int worker);
    void gate_up_task(const Segment& segment, int task, float* room);
    void prefetch_gate_up(int task) const;
    void prefetch_down(int task) const;
    void down_tasks(int worker);
    void down_task(const Segment& segment, int chunk, int block);
    void sum_tasks(int worker);
    void sum_block(const Segment& segment, int begin, int end, int pair, float* room);

    ExpertsCall call_;
    int first_group_ = 0, down_group_ = 0;  // 0: fp32 activations
    int gate_rows_ = 0, down_rows_ = 0;  // rows of a task
    int sum_rows_ = 0;                      // columns of the sums that one task owns
    int room_ = 0;                          // floats of one worker
    int workers_ = 1;
    int slab_begin_ = 0, slab_end_ = 0;
    std::vector<Segment> gate_up_segments_, down_segments_;
    int gate_up_count_ = 0, down_count_ = 0;
    PairRows rows_;
    KeptRows h_;
    Buffer<float> rooms_;
    TaskRanges gate_up_tasks_, down_tasks_;
};

// Checks a call and runs it on the pool.
void experts_forward(const ExpertsCall& call);
// The most that ExpertsRun keeps for calls of up to so many tokens and pairs, in bytes.
std::size_t experts_scratch_bytes(const ExpertsLayer& layer, const Expert& expert, int tokens, int pairs, int workers);

}  // namespace gangline
