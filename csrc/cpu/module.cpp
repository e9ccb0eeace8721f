// The Python face of the native CPU core. Pointers and plain values cross it; torch is not needed to build it.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "bindings.hpp"
#include "cpu_features.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.doc() = "Native CPU core of gangline.";
    m.def("cpu_features", &gangline::cpu_features,
          "Return name -> bool for every instruction set extension known on this architecture; true where both the "
          "processor and the operating system support it.");
    gangline::bind_tiles(m);
}
