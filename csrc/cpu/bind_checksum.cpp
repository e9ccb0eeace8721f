// Shows checksums to Python.

#include <nanobind/ndarray.h>

#include "bindings.hpp"
#include "checksum.hpp"

namespace nb = nanobind;

namespace gangline {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::uint32_t checksum(const Bytes& data, std::uint32_t crc, bool by_tables) {
    const std::uint8_t* bytes = data.data();
    const std::size_t count = data.size();
    const nb::gil_scoped_release released;
    return by_tables ? crc32_by_tables(crc, bytes, count) : crc32(crc, bytes, count);
}

}  // namespace

void bind_checksum(nb::module_& m) {
    m.def("crc32", &checksum, nb::arg("data"), nb::arg("crc") = 0, nb::kw_only(), nb::arg("by_tables") = false,
          "Return zlib's CRC-32 of bytes (uint8, contiguous), going on from `crc`. `by_tables`: with portable code alone.");
}

}  // namespace gangline
