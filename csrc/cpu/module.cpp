// The Python face of the native CPU core. Pointers and plain values cross it; torch is not needed to build it.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "bindings.hpp"
#include "cpu_features.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
    // At exit the interpreter drops modules in no fixed order: objects that models still hold then are no leaks.
    nb::set_leak_warnings(false);
    m.doc() = "Native CPU core of gangline.";
    m.def("cpu_features", &gangline::cpu_features,
          "Return name -> bool for every instruction set extension known on this architecture; true where both the "
          "processor and the operating system support it.");
    gangline::bind_tiles(m);
    gangline::bind_experts(m);
    gangline::bind_encode(m);
    gangline::bind_retile(m);
    gangline::bind_checksum(m);
    gangline::bind_reads(m);
    gangline::bind_decoder(m);
}
