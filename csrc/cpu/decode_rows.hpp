// Rows of activations that matrices are multiplied with, in fp32 and in every int8 form that those matrices need, and the
// products themselves, split between the workers of one parallel call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "matrix.hpp"
#include "task_ranges.hpp"

namespace gangline {

// Who works, inside parallel().
struct Team {
    int worker = 0, workers = 1;
};

// A matrix with an optional bias in fp32.
struct Linear {
    Matrix matrix;
    const float* bias = nullptr;
};

class ActivationRows {
public:
    // Columns are worked on in blocks of so many, a multiple of every group.
    static constexpr int block = 128;

    void set_columns(int columns);
    // Call once for each matrix that reads these rows, or the first of their columns.
    void add_reader(const Matrix& w);
    void set_rows(int rows);
    // Gives the memory back.
    void release();
    // Bytes of one row, in all its forms.
    std::size_t row_bytes() const;

    float* row(int t) const { return x_.data() + t * stride_; }
    float* data() const { return x_.data(); }
    std::ptrdiff_t stride() const { return stride_; }
    int columns() const { return columns_; }
    int blocks() const { return (columns_ + block - 1) / block; }
    // Makes the int8 forms of one block of columns of one row, for matrices that read so many columns.
    void quantize(int t, int block_index, int columns);
    // The first `rows` of them.
    Activations as(const Matrix& w, int rows) const;

private:
    struct Form {
        int group = 0, columns = 0, padded = 0;
        std::vector<std::int8_t> q;
        std::vector<float> scale;
        std::vector<std::int32_t> sum;
    };
    int columns_ = 0;
    std::ptrdiff_t stride_ = 0;
    Buffer<float> x_;
    std::vector<Form> forms_;
};

// y = x w^T + bias; where there is a residual, that is increased by the product instead of leaving it alone in y.
struct Product {
    const Linear* linear = nullptr;
    const ActivationRows* x = nullptr;
    int rows = 0;               // of x, from the first on
    float* y = nullptr;
    std::ptrdiff_t y_stride = 0;
    float* residual = nullptr;  // [rows, y_stride]
    const float* gate = nullptr;  // [rows], or none: what is added to the residual is scaled by its sigmoid
};

// Some products that do not depend on each other, by all workers: one whom the system holds up does not hold up the others.
// Nothing of `ranges` is taken before.
void multiply(const Product* products, int count, Team team, TaskRanges& ranges);

}  // namespace gangline
