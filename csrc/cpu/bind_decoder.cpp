// Shows the decode step to Python. Pointers are integers; whoever makes an object keeps alive what it points to.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <stdexcept>

#include "bindings.hpp"
#include "decoder.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace gangline {
namespace {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer pointer) {
    return reinterpret_cast<T*>(pointer);
}

Format plain_format(const std::string& codec) {
    static const std::map<std::string, Format> known{{"fp32", Format::f32}, {"fp16", Format::f16}, {"bf16", Format::bf16}};
    const auto found = known.find(codec);
    if (found == known.end()) throw std::invalid_argument("'" + codec + "' is not one of fp32, fp16, bf16");
    return found->second;
}

Score score_named(const std::string& name) {
    static const std::map<std::string, Score> known{
        {"softmax", Score::softmax}, {"sigmoid", Score::sigmoid}, {"softmax_topk", Score::softmax_topk}};
    const auto found = known.find(name);
    if (found == known.end()) throw std::invalid_argument("the native core does not score by '" + name + "'");
    return found->second;
}

RouterRule make_rule(int classes, int k, const std::string& score, bool choose_by_logit, Pointer bias, int groups, int keep,
                     bool group_by_top2, float group_fill, bool normalise, float norm_eps, float norm_min, float scale,
                     Pointer expert_scale) {
    if (k < 1 || k > classes) throw std::invalid_argument("a router cannot choose so many of its classes");
    if (groups > 64 || (groups > 0 && (classes % groups != 0 || keep < 1 || keep > groups)))
        throw std::invalid_argument("experts do not fall into such groups");
    return {classes,       k,          score_named(score), choose_by_logit, at<const float>(bias),
            groups,        keep,       group_by_top2,      group_fill,      normalise,
            norm_eps,      norm_min,   scale,              at<const float>(expert_scale)};
}

DecoderLayer make_layer(const Norm& attention_norm, const AttentionSpec& attention, const Norm& mlp_norm,
                        std::optional<Linear> router, std::optional<RouterRule> rule, std::optional<MlpSpec> mlp,
                        std::optional<Linear> shared_gate) {
    if (router.has_value() != rule.has_value()) throw std::invalid_argument("a router needs a rule");
    if (!router && !mlp) throw std::invalid_argument("a layer needs experts or a dense network");
    return {attention_norm, attention, mlp_norm, router, rule.value_or(RouterRule{}), mlp, shared_gate};
}

void begin(Decoder& self, int sequences, int tokens, Pointer embedded, Pointer positions, Pointer first, int length,
           const std::vector<std::int64_t>& cache, Pointer moe_input, Pointer ids, Pointer weights, Pointer logits,
           bool last_only) {
    if (cache.size() != 3 * self.spec().layers.size()) throw std::invalid_argument("three numbers for each layer's cache");
    Step step;
    if (sequences < 1 || tokens < 1) throw std::invalid_argument("a step needs a token");
    step.sequences = sequences;
    step.tokens = tokens;
    step.embedded = at<const void>(embedded);
    step.positions = at<const std::int64_t>(positions);
    step.first = at<const std::int64_t>(first);
    step.length = length;
    step.last_only = last_only;
    for (std::size_t i = 0; i < cache.size(); i += 3) {
        if (cache[i + 2] < length + tokens) throw std::invalid_argument("a layer's cache is full");
        step.cache.push_back({at<std::uint16_t>(static_cast<Pointer>(cache[i])),
                              at<std::uint16_t>(static_cast<Pointer>(cache[i + 1])), cache[i + 2]});
    }
    step.moe_input = at<float>(moe_input);
    step.ids = at<std::int64_t>(ids);
    step.weights = at<float>(weights);
    step.logits = at<void>(logits);
    const nb::gil_scoped_release unlocked;
    self.begin(step);
}

void set_experts(Decoder& self, const std::vector<std::pair<ExpertsLayer, std::vector<Expert>>>& table) {
    std::vector<LayerExperts> layers;
    for (const auto& [layer, experts] : table) layers.push_back({layer, experts});
    self.set_experts(std::move(layers));
}

void score_rows(Pointer logits, int rows, int classes, bool sigmoid) {
    float* z = at<float>(logits);
    for (int t = 0; t < rows; ++t, z += classes) score_row(z, classes, sigmoid, z);
}

std::vector<std::pair<std::vector<int>, std::vector<float>>> rank_rows(Pointer scores, int rows, int classes) {
    std::vector<std::pair<std::vector<int>, std::vector<float>>> ranked(static_cast<std::size_t>(rows));
    const float* score = at<const float>(scores);
    for (auto& [order, values] : ranked) {
        order.resize(static_cast<std::size_t>(classes));
        rank_row(score, classes, order.data());
        for (const int i : order) values.push_back(score[i]);
        score += classes;
    }
    return ranked;
}

void route_rows(const RouterRule& rule, Pointer logits, int rows, Pointer ids, Pointer weights) {
    std::vector<float> scratch(2 * static_cast<std::size_t>(rule.classes));
    for (int t = 0; t < rows; ++t) {
        route(rule, at<const float>(logits) + std::ptrdiff_t{t} * rule.classes, scratch.data(),
              at<std::int64_t>(ids) + std::ptrdiff_t{t} * rule.k, at<float>(weights) + std::ptrdiff_t{t} * rule.k);
    }
}

void check_layer(const Decoder& self, int layer) {
    if (layer < 0 || layer >= static_cast<int>(self.spec().layers.size())) throw std::out_of_range("no such layer");
}

void bind_parts(nb::module_& m) {
    nb::class_<Norm>(m, "Norm", "Weights of an RMS norm.")
        .def("__init__",
             [](Norm* self, Pointer weight, const std::string& codec, int size, float eps) {
                 new (self) Norm{at<const void>(weight), plain_format(codec), size, eps};
             },
             "weight"_a, "codec"_a, "size"_a, "eps"_a);
    nb::class_<Linear>(m, "Linear", "A matrix with an optional bias in fp32.")
        .def("__init__",
             [](Linear* self, const Matrix& matrix, Pointer bias) { new (self) Linear{matrix, at<const float>(bias)}; },
             "matrix"_a, "bias"_a = 0)
        .def_prop_ro("rows", [](const Linear& self) { return self.matrix.rows; });
    nb::class_<AttentionSpec>(m, "Attention", "Projections and constants of one attention.")
        .def("__init__",
             [](AttentionSpec* self, const Linear& q, const Linear& k, const Linear& v, const Linear& o, int heads,
                int kv_heads, int head_dim, float scaling, int window, std::optional<Norm> q_norm, std::optional<Norm> k_norm,
                float clip, Pointer sinks) {
                 if (kv_heads < 1 || heads % kv_heads != 0 || q.matrix.rows != heads * head_dim ||
                     k.matrix.rows != kv_heads * head_dim || v.matrix.rows != k.matrix.rows ||
                     o.matrix.cols != q.matrix.rows)
                     throw std::invalid_argument("projections do not fit the heads");
                 new (self) AttentionSpec{q,      k,      v,      o,    heads, kv_heads, head_dim, scaling,
                                          window, q_norm, k_norm, clip, at<const float>(sinks)};
             },
             "q"_a, "k"_a, "v"_a, "o"_a, nb::kw_only(), "heads"_a, "kv_heads"_a, "head_dim"_a, "scaling"_a, "window"_a = 0,
             "q_norm"_a = nb::none(), "k_norm"_a = nb::none(), "clip"_a = std::numeric_limits<float>::infinity(),
             "sinks"_a = 0);
    nb::class_<MlpSpec>(m, "Mlp", "A dense network with a gate.")
        .def("__init__",
             [](MlpSpec* self, const Linear& gate, const Linear& up, const Linear& down, const std::string& activation) {
                 if (gate.matrix.rows != up.matrix.rows || down.matrix.cols != up.matrix.rows)
                     throw std::invalid_argument("the matrices of a dense network do not fit each other");
                 new (self) MlpSpec{gate, up, down, parse_gate(activation, 1.0f, std::numeric_limits<float>::infinity())};
             },
             "gate"_a, "up"_a, "down"_a, "activation"_a);
    nb::class_<RouterRule>(m, "RouterRule", "What a router does after its logits.")
        .def("__init__",
             [](RouterRule* self, int classes, int k, const std::string& score, bool choose_by_logit, Pointer bias, int groups,
                int keep, bool group_by_top2, float group_fill, bool normalise, float norm_eps, float norm_min, float scale,
                Pointer expert_scale) {
                 new (self) RouterRule(make_rule(classes, k, score, choose_by_logit, bias, groups, keep, group_by_top2,
                                                 group_fill, normalise, norm_eps, norm_min, scale, expert_scale));
             },
             nb::kw_only(), "classes"_a, "k"_a, "score"_a, "choose_by_logit"_a = false, "bias"_a = 0, "groups"_a = 0,
             "keep"_a = 0, "group_by_top2"_a = false, "group_fill"_a = 0.0f, "normalise"_a = false, "norm_eps"_a = 0.0f,
             "norm_min"_a = 0.0f, "scale"_a = 1.0f, "expert_scale"_a = 0);
    nb::class_<DecoderLayer>(m, "DecoderLayer", "One layer; without a router its network is dense.")
        .def("__init__",
             [](DecoderLayer* self, const Norm& attention_norm, const AttentionSpec& attention, const Norm& mlp_norm,
                std::optional<Linear> router, std::optional<RouterRule> rule, std::optional<MlpSpec> mlp,
                std::optional<Linear> shared_gate) {
                 new (self) DecoderLayer(make_layer(attention_norm, attention, mlp_norm, router, rule, mlp, shared_gate));
             },
             "attention_norm"_a, "attention"_a, "mlp_norm"_a, nb::kw_only(), "router"_a = nb::none(), "rule"_a = nb::none(),
             "mlp"_a = nb::none(), "shared_gate"_a = nb::none());
}

}  // namespace

void bind_decoder(nb::module_& m) {
    bind_parts(m);
    nb::class_<Decoder>(m, "Decoder", "One step of a MoE transformer; see kernels/cpu/decoder.py.")
        .def("__init__",
             [](Decoder* self, int hidden, const std::string& numbers, const Norm& final_norm, const Linear& head,
                std::vector<float> inverse_frequencies, float rope_scaling, std::vector<DecoderLayer> layers) {
                 new (self) Decoder(DecoderSpec{hidden, plain_format(numbers), final_norm, head, std::move(inverse_frequencies), rope_scaling,
                                                std::move(layers)});
             },
             nb::kw_only(), "hidden"_a, "numbers"_a, "final_norm"_a, "head"_a,
             "inverse_frequencies"_a, "rope_scaling"_a, "layers"_a)
        .def_prop_ro("hidden", [](const Decoder& self) { return reinterpret_cast<Pointer>(self.hidden()); })
        .def_prop_ro("hidden_stride", &Decoder::hidden_stride)
        .def("begin", &begin, "sequences"_a, "tokens"_a, "embedded"_a, "positions"_a, "first"_a, "length"_a, "cache"_a,
             "moe_input"_a, "ids"_a, "weights"_a, "logits"_a, "last_only"_a = false)
        .def("front",
             [](Decoder& self, int layer) {
                 check_layer(self, layer);
                 self.front(layer);
             },
             "layer"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("back",
             [](Decoder& self, Pointer moe_output) { self.back(at<const float>(moe_output)); }, "moe_output"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("head", nb::overload_cast<>(&Decoder::head), nb::call_guard<nb::gil_scoped_release>())
        .def("set_experts", &set_experts, "table"_a)
        .def("set_block_rows", &Decoder::set_block_rows, "rows"_a)
        .def("release", &Decoder::release)
        .def("step_all", &Decoder::step_all, nb::call_guard<nb::gil_scoped_release>());
    m.def("score_rows", &score_rows, "logits"_a, "rows"_a, "classes"_a, "sigmoid"_a,
          "Turn rows of fp32 logits into scores, in place: sigmoids, or their softmax.");
    m.def("rank_rows", &rank_rows, "scores"_a, "rows"_a, "classes"_a,
          "Return for each row of fp32 scores all classes, best first (ties: ascending), and their scores.");
    m.def("route", &route_rows, "rule"_a, "logits"_a, "rows"_a, "ids"_a, "weights"_a,
          "Route rows of fp32 logits; ids int64 and weights fp32 are [rows, k].");
}

}  // namespace gangline
