// Matrix products for rows that belong to several matrices, and the weighted sum of the experts' outputs.
#pragma once

#include <atomic>
#include <vector>

#include "experts.hpp"

namespace gangline {

// Rows [starts[i], starts[i + 1]) of y = their rows of x, times matrices[i] transposed, plus bias (fp32 [rows of a matrix]
// or null; one for all). y: row p begins y_stride values after row p - 1. All matrices have the same shape and format.
struct ProductsCall {
    RowSource x;
    const int* starts = nullptr;
    const Matrix* const* matrices = nullptr;
    int count = 0;
    const float* bias = nullptr;
    void* y = nullptr;
    std::ptrdiff_t y_stride = 0;
    Dtype y_dtype = Dtype::f32;
};

// Throws std::invalid_argument where the matrices do not fit the rows or each other, or the kernels in use lack a format.
void check_products(const ProductsCall& call);

// Runs calls one after another on memory that it keeps.
class ProductsRun {
public:
    // By all workers inside parallel(), with the same call, after check_products(). Results are complete when all returned.
    void work(const ProductsCall& call, int worker, int workers);

private:
    void prepare(const ProductsCall& call, int workers);
    void plan_slab(int workers);
    void task(const Segment& segment, int chunk, int block, float* room);

    ProductsCall call_;
    int group_ = 0, rows_of_task_ = 0;
    int slab_begin_ = 0, slab_end_ = 0;
    std::vector<Segment> segments_;
    int tasks_ = 0;
    PairRows rows_;
    Buffer<float> rooms_;
    alignas(64) std::atomic<int> next_{0};
};

// Checks a call and runs it on the pool.
void grouped_products(const ProductsCall& call);

// out[t] = sum over the pairs of token t, in the order in which they come, of weight * y; fp32, one fused multiply-add a
// pair where the hardware has it, then rounded. A token without pairs gets zeros.
struct CombineCall {
    const float* y = nullptr;  // [pairs, hidden]
    const std::int64_t* token_of_pair = nullptr;
    const float* weights = nullptr;
    int pairs = 0;
    int tokens = 0;
    int hidden = 0;
    void* out = nullptr;       // [tokens, hidden]
    Dtype out_dtype = Dtype::f32;
    bool accumulate = false;   // go on from the sums in `out` (fp32) instead of from zero
};

// Throws std::invalid_argument where a pair's token does not exist.
void combine(const CombineCall& call);

}  // namespace gangline
