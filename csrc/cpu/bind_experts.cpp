// Shows the experts of a layer, linear layers and the sum of experts' outputs to Python.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <stdexcept>

#include "bindings.hpp"
#include "experts.hpp"
#include "linear.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace gangline {
namespace {

using Address = std::uintptr_t;
using Starts = std::vector<int>;

Expert make_expert(const std::vector<Matrix>& matrices, Address gate_up_bias, Address down_bias) {
    if (matrices.size() < 2 || matrices.size() > 3) throw std::invalid_argument("an expert has two or three matrices");
    Expert expert;
    expert.first = matrices.front();
    if (matrices.size() == 3) expert.second = matrices[1];
    expert.down = matrices.back();
    expert.gate_up_bias = reinterpret_cast<const float*>(gate_up_bias);
    expert.down_bias = reinterpret_cast<const float*>(down_bias);
    return expert;
}

ExpertsLayer make_layer(int hidden, int intermediate, const std::string& gate, float alpha, float limit, bool interleaved) {
    if (hidden < 1 || intermediate < 1) throw std::invalid_argument("a layer's sizes must be positive");
    return {hidden, intermediate, parse_gate(gate, alpha, limit), interleaved};
}

// Starts must be those of `count` neighbouring ranges of rows, the first beginning at 0.
void check_starts(const Starts& starts, std::size_t count) {
    if (starts.size() != count + 1 || starts.front() != 0) {
        throw std::invalid_argument("starts must hold 0 and then the end of each expert's rows");
    }
    for (std::size_t i = 0; i < count; ++i) {
        if (starts[i + 1] < starts[i]) throw std::invalid_argument("starts must not descend");
    }
}

RowSource source_of(Address x, const std::string& dtype, int tokens, int cols, Address token_ids, int pairs) {
    const RowSource source{reinterpret_cast<const void*>(x), parse_dtype(dtype), tokens, cols,
                           reinterpret_cast<const std::int64_t*>(token_ids)};
    if (source.token_of_pair == nullptr && pairs > tokens) throw std::invalid_argument("there are more pairs than rows");
    for (int p = 0; source.token_of_pair != nullptr && p < pairs; ++p) {
        if (source.token_of_pair[p] < 0 || source.token_of_pair[p] >= tokens) {
            throw std::invalid_argument("pair " + std::to_string(p) + " names a row that does not exist");
        }
    }
    return source;
}

void experts_forward_of(const ExpertsLayer& layer, Address x, const std::string& dtype, int tokens, Address token_ids,
                        const Starts& starts, const std::vector<const Expert*>& experts, Address y) {
    check_starts(starts, experts.size());
    const nb::gil_scoped_release released;
    ExpertsCall call;
    call.layer = &layer;
    call.x = source_of(x, dtype, tokens, layer.hidden, token_ids, starts.back());
    call.starts = starts.data();
    call.experts = experts.data();
    call.count = static_cast<int>(experts.size());
    call.y = reinterpret_cast<float*>(y);
    experts_forward(call);
}

void experts_sums_of(const ExpertsLayer& layer, Address x, const std::string& dtype, int tokens, Address token_ids,
                     const Starts& starts, const std::vector<const Expert*>& experts, Address weights, Address sum) {
    check_starts(starts, experts.size());
    if (token_ids == 0 && starts.back() > 0) throw std::invalid_argument("sums need the row of every pair");
    const nb::gil_scoped_release released;
    ExpertsCall call;
    call.layer = &layer;
    call.x = source_of(x, dtype, tokens, layer.hidden, token_ids, starts.back());
    call.starts = starts.data();
    call.experts = experts.data();
    call.count = static_cast<int>(experts.size());
    call.weight_of_pair = reinterpret_cast<const float*>(weights);
    call.sum = reinterpret_cast<float*>(sum);
    experts_forward(call);
}

void products_of(const std::vector<const Matrix*>& matrices, Address x, const std::string& dtype, int tokens,
                 Address token_ids, const Starts& starts, Address y, std::ptrdiff_t y_stride) {
    check_starts(starts, matrices.size());
    if (matrices.empty()) return;
    const nb::gil_scoped_release released;
    ProductsCall call;
    call.x = source_of(x, dtype, tokens, matrices.front()->cols, token_ids, starts.back());
    call.starts = starts.data();
    call.matrices = matrices.data();
    call.count = static_cast<int>(matrices.size());
    call.y = reinterpret_cast<void*>(y);
    call.y_stride = y_stride;
    grouped_products(call);
}

void linear_of(const Matrix& matrix, Address x, const std::string& x_dtype, int tokens, Address y,
               const std::string& y_dtype, Address bias) {
    const nb::gil_scoped_release released;
    const int starts[] = {0, tokens};
    const Matrix* const matrices[] = {&matrix};
    ProductsCall call;
    call.x = source_of(x, x_dtype, tokens, matrix.cols, 0, tokens);
    call.starts = starts;
    call.matrices = matrices;
    call.count = 1;
    call.bias = reinterpret_cast<const float*>(bias);
    call.y = reinterpret_cast<void*>(y);
    call.y_stride = matrix.rows;
    call.y_dtype = parse_dtype(y_dtype);
    grouped_products(call);
}

void combine_of(Address y, Address token_ids, Address weights, int pairs, int tokens, int hidden, Address out,
                const std::string& out_dtype, bool accumulate) {
    const nb::gil_scoped_release released;
    CombineCall call;
    call.y = reinterpret_cast<const float*>(y);
    call.token_of_pair = reinterpret_cast<const std::int64_t*>(token_ids);
    call.weights = reinterpret_cast<const float*>(weights);
    call.pairs = pairs;
    call.tokens = tokens;
    call.hidden = hidden;
    call.out = reinterpret_cast<void*>(out);
    call.out_dtype = parse_dtype(out_dtype);
    call.accumulate = accumulate;
    combine(call);
}

}  // namespace

void bind_experts(nb::module_& m) {
    nb::class_<Expert>(m, "Expert", "The matrices of one expert in slot order, and its fp32 biases (addresses, or 0).")
        .def("__init__",
             [](Expert* self, const std::vector<Matrix>& matrices, Address gate_up_bias, Address down_bias) {
                 new (self) Expert(make_expert(matrices, gate_up_bias, down_bias));
             },
             nb::arg("matrices"), nb::arg("gate_up_bias") = 0, nb::arg("down_bias") = 0);
    nb::class_<ExpertsLayer>(m, "MoELayer", "Sizes, gate formula (see gates.hpp) and column order of a layer's experts.")
        .def("__init__",
             [](ExpertsLayer* self, int hidden, int intermediate, const std::string& gate, float alpha, float limit,
                bool interleaved) {
                 new (self) ExpertsLayer(make_layer(hidden, intermediate, gate, alpha, limit, interleaved));
             },
             nb::arg("hidden"), nb::arg("intermediate"), nb::arg("gate") = "silu", nb::arg("alpha") = 1.0f,
             nb::arg("limit") = std::numeric_limits<float>::infinity(), nb::arg("interleaved") = false);
    m.def("experts_forward", &experts_forward_of, nb::arg("layer"), nb::arg("x"), nb::arg("x_dtype"), nb::arg("tokens"),
          nb::arg("token_ids"), nb::arg("starts"), nb::arg("experts"), nb::arg("y"),
          "Compute y [pairs, hidden] fp32: the outputs of all pairs, not weighted. token_ids: int64 [pairs].");
    m.def("grouped_products", &products_of, nb::arg("matrices"), nb::arg("x"), nb::arg("x_dtype"), nb::arg("tokens"),
          nb::arg("token_ids"), nb::arg("starts"), nb::arg("y"), nb::arg("y_stride"),
          "Compute y [pairs, rows of a matrix] fp32, one matrix for each range of pairs; token_ids 0: pair p reads row p.");
    m.def("linear", &linear_of, nb::arg("matrix"), nb::arg("x"), nb::arg("x_dtype"), nb::arg("tokens"), nb::arg("y"),
          nb::arg("y_dtype"), nb::arg("bias") = 0, "Compute y = x @ w.T + bias; bias: fp32 [rows] or 0.");
    m.def("combine", &combine_of, nb::arg("y"), nb::arg("token_ids"), nb::arg("weights"), nb::arg("pairs"),
          nb::arg("tokens"), nb::arg("hidden"), nb::arg("out"), nb::arg("out_dtype"),
          nb::arg("accumulate") = false,
          "Compute out [tokens, hidden]: each token's weighted sum of its pairs, in their order, from zero or (accumulate, "
          "fp32 only) from what is there.");
    m.def("experts_sums", &experts_sums_of, nb::arg("layer"), nb::arg("x"), nb::arg("x_dtype"), nb::arg("tokens"),
          nb::arg("token_ids"), nb::arg("starts"), nb::arg("experts"), nb::arg("weights"), nb::arg("sum"),
          "As experts_forward, but add every pair's weighted output to its token's row of sum [tokens, hidden], fp32.");
    m.def("experts_scratch_bytes",
          [](const ExpertsLayer& layer, const Expert& expert, int tokens, int pairs) {
              return experts_scratch_bytes(layer, expert, tokens, pairs, threads());
          },
          nb::arg("layer"), nb::arg("expert"), nb::arg("tokens"), nb::arg("pairs"),
          "Return the bytes that experts_forward keeps for calls of up to so many tokens and pairs.");
}

}  // namespace gangline
