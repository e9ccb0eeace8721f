// Shows weight matrices, the pool of threads and the tables of kernels to Python.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <stdexcept>

#include "bindings.hpp"
#include "kernels.hpp"
#include "threads.hpp"
#include "tile_layout.hpp"

namespace nb = nanobind;

namespace gangline {
namespace {

struct Codec {
    Format format;
    int group = 32;
    bool has_zeros = false;
    bool byte_scales = false;
    int unit = 1;  // columns come in multiples of it
    SparsePattern sparse = {};
};

// The patterns N:M of the Samoyeds paper and what lies between them; more would only lengthen the list.
void add_sparse(std::map<std::string, Codec>& known) {
    const auto add = [&](int n, int m, int v) {
        const SparsePattern pattern{n, m, v};
        const std::string name =
            "samoyeds16:" + std::to_string(n) + ":" + std::to_string(m) + ":" + std::to_string(v) + "/";
        known[name + "bf16"] = {Format::sparse_bf16, 0, false, false, 1, pattern};
        known[name + "fp16"] = {Format::sparse_f16, 0, false, false, 1, pattern};
        for (const int group : {32, 64, 128}) {
            known[name + "int8g" + std::to_string(group)] = {Format::sparse_int8, group, false, false, 1, pattern};
            known[name + "int4g" + std::to_string(group)] = {Format::sparse_int4, group, false, false, 1, pattern};
        }
    };
    for (const int v : {16, 32, 64, 128, 256}) {
        for (const int m : {1, 2, 4, 8}) {
            for (int n = 1; n <= m; ++n) add(n, m, v);
        }
        for (const int n : {2, 4, 8, 12}) add(n, 16, v);
    }
}

std::map<std::string, Codec> known_codecs() {
    std::map<std::string, Codec> known{
        {"fp32", {Format::f32}},
        {"fp16", {Format::f16}},
        {"bf16", {Format::bf16}},
        {"ggml:Q4_0", {Format::q4_0, 32, false, false, 32}},
        {"ggml:Q8_0", {Format::q8_0, 32, false, false, 32}},
        {"ggml:Q4_K", {Format::q4_k, 32, false, false, 256}},
        {"ggml:Q5_K", {Format::q5_k, 32, false, false, 256}},
        {"ggml:Q6_K", {Format::q6_k, 16, false, false, 256}},
        {"tile16:mxfp4", {Format::tile_mxfp4}},
    };
    for (const Format format :
         {Format::tile_int2, Format::tile_int3, Format::tile_int4, Format::tile_int6, Format::tile_int8}) {
        for (const int group : {32, 64, 128}) {
            const std::string name = "tile16:int" + std::to_string(code_bits(format)) + "g" + std::to_string(group);
            known[name] = {format, group, false};
            known[name + "z"] = {format, group, true};
            known[name + "d"] = {format, group, false, true};
        }
    }
    add_sparse(known);
    return known;
}

Matrix make_matrix(std::uintptr_t data, int rows, int cols, const std::string& codec) {
    static const std::map<std::string, Codec> known = known_codecs();
    const auto found = known.find(codec);
    if (found == known.end()) throw std::invalid_argument("the native core does not know the format '" + codec + "'");
    const Codec& c = found->second;
    if (rows < 1 || cols < 1 || cols % c.unit != 0) {
        throw std::invalid_argument("a " + codec + " matrix cannot have " + std::to_string(rows) + " rows and " +
                                    std::to_string(cols) + " columns");
    }
    return {reinterpret_cast<const std::uint8_t*>(data), rows, cols, c.format, c.group, c.has_zeros, c.byte_scales, c.sparse};
}

std::vector<std::string> native_formats() {
    std::vector<std::string> names;
    for (const auto& [name, codec] : known_codecs()) {
        if (kernels().matmul[static_cast<int>(codec.format)] != nullptr) names.push_back(name);
    }
    return names;
}

// Owns the int8 form of some rows.
struct Quantized {
    std::vector<std::int8_t> q;
    std::vector<float> scale;
    std::vector<std::int32_t> sum;

    void fill(Activations& x) {
        const std::size_t tokens = static_cast<std::size_t>(x.tokens);
        x.padded = (x.cols + x.group - 1) / x.group * x.group;
        q.resize(tokens * static_cast<std::size_t>(x.padded));
        scale.resize(tokens * static_cast<std::size_t>(x.padded / x.group));
        sum.resize(scale.size());
        kernels().quantize_rows(x.x, x.stride, x.tokens, x.cols, x.group, x.padded, q.data(), scale.data(), sum.data());
        x.q = q.data();
        x.scale = scale.data();
        x.sum = sum.data();
    }
};

void matmul(const Matrix& w, std::uintptr_t x_ptr, int tokens, std::uintptr_t y_ptr) {
    Activations x;
    x.x = reinterpret_cast<const float*>(x_ptr);
    x.stride = w.cols;
    x.tokens = tokens;
    x.cols = w.cols;
    Quantized quantized;
    if (needs_int8_activations(w.format)) {
        x.group = activation_group(w);
        quantized.fill(x);
    }
    const MatmulRows rows = kernels().matmul[static_cast<int>(w.format)];
    if (rows == nullptr) throw std::runtime_error("these kernels do not have the format");
    float* y = reinterpret_cast<float*>(y_ptr);
    parallel([&](int worker, int workers) {
        const Range part = share(w.rows, tile_rows, worker, workers);
        if (part.begin < part.end) rows(w, part.begin, part.end, x, y, w.rows);
    });
}

void set_threads_checked(int count) {
    if (count < 1) throw std::invalid_argument("threads must be at least 1");
    set_threads(count);
}

}  // namespace

void bind_tiles(nb::module_& m) {
    nb::class_<Matrix>(m, "Matrix", "A weight matrix in the bytes of a codec; it does not own them.")
        .def("__init__",
             [](Matrix* self, std::uintptr_t data, int rows, int cols, const std::string& codec) {
                 new (self) Matrix(make_matrix(data, rows, cols, codec));
             },
             nb::arg("data"), nb::arg("rows"), nb::arg("cols"), nb::arg("codec"))
        .def_ro("rows", &Matrix::rows)
        .def_ro("cols", &Matrix::cols);
    m.def("native_formats", &native_formats, "Names of the codecs that the kernels in use compute with.");
    m.def("set_threads", &set_threads_checked, nb::arg("threads"), "Compute with so many threads from the next call on.");
    m.def("threads", &threads, "Return how many threads compute, the calling one included.");
    m.def("use_kernels", &use_kernels, nb::arg("name"), "Use another table of kernels; RuntimeError if it cannot run here.");
    m.def("usable_kernels", &usable_kernels, "Return the names of the tables that can run here, narrowest first.");
    m.def("kernels_name", [] { return std::string(kernels().name); }, "Return the name of the table in use.");
    m.def("_matmul", &matmul, nb::arg("matrix"), nb::arg("x"), nb::arg("tokens"), nb::arg("y"),
          nb::call_guard<nb::gil_scoped_release>(),
          "Compute y = x @ w.T, all of it fp32: x [tokens, cols], y [tokens, rows]. For tests and benchmarks.");
}

}  // namespace gangline
