// Each part of the native core shows itself to Python by one function, in its own bind_*.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace gangline {

void bind_tiles(nanobind::module_& m);
void bind_experts(nanobind::module_& m);
void bind_encode(nanobind::module_& m);
void bind_retile(nanobind::module_& m);
void bind_checksum(nanobind::module_& m);
void bind_reads(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);

}  // namespace gangline
