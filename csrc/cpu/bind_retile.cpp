// Shows the change from ggml blocks to tiles to Python.

#include <nanobind/stl/string.h>

#include "bindings.hpp"
#include "retile.hpp"

namespace nb = nanobind;

namespace gangline {
namespace {

RetileJob job_of(std::uintptr_t blocks, std::uintptr_t tiles, int rows, int cols) {
    return {reinterpret_cast<const std::uint8_t*>(blocks), reinterpret_cast<std::uint8_t*>(tiles), rows, cols};
}

}  // namespace

void bind_retile(nb::module_& m) {
    m.def(
        "retile",
        [](const std::string& codec, std::uintptr_t blocks, std::uintptr_t tiles, int rows, int cols) {
            return retile(codec, job_of(blocks, tiles, rows, cols));
        },
        nb::arg("codec"), nb::arg("blocks"), nb::arg("tiles"), nb::arg("rows"), nb::arg("cols"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Write the tiles of a matrix in ggml blocks. Return False where tiles cannot hold a scale.");
    m.def(
        "retile_in_place",
        [](const std::string& codec, std::uintptr_t blocks, std::uintptr_t tiles, int rows, int cols) {
            return retile_in_place(codec, job_of(blocks, tiles, rows, cols));
        },
        nb::arg("codec"), nb::arg("blocks"), nb::arg("tiles"), nb::arg("rows"), nb::arg("cols"),
        nb::call_guard<nb::gil_scoped_release>(),
        "The same over the blocks themselves, or up to 64 bytes before, on the calling thread. ValueError where the tiles "
        "are not as large as the blocks.");
}

}  // namespace gangline
