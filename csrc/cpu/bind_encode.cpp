// Shows the encoder of tiles to Python.

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "encode.hpp"
#include "tile_layout.hpp"

namespace nb = nanobind;

namespace gangline {
namespace {

Format number_format(const std::string& name) {
    if (name == "f32") return Format::f32;
    if (name == "bf16") return Format::bf16;
    if (name == "f16") return Format::f16;
    throw std::invalid_argument("numbers are f32, bf16 or f16, not '" + name + "'");
}

bool encode_matrix(const Matrix& tiles, std::uintptr_t weights, const std::string& number, std::ptrdiff_t row_stride,
                   std::ptrdiff_t column_stride) {
    if (!is_tiled(tiles.format)) throw std::invalid_argument("only matrices in tiles can be encoded");
    if (row_stride != 1 && column_stride != 1) throw std::invalid_argument("one of the strides must be 1");
    const Format format = number_format(number);
    const nb::gil_scoped_release released;
    return encode({reinterpret_cast<const void*>(weights), format, row_stride, column_stride, tiles, {}});
}

}  // namespace

void bind_encode(nb::module_& m) {
    m.def("encode", &encode_matrix, nb::arg("tiles"), nb::arg("weights"), nb::arg("number"), nb::arg("row_stride"),
          nb::arg("column_stride"),
          "Fill the bytes of a Matrix in tiles from plain numbers (strides in numbers). Return False where the format "
          "cannot hold a weight: nan, infinite, or past its scales.");
}

}  // namespace gangline
