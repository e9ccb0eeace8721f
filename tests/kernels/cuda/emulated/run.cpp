// Runs one kernel of csrc/cuda on the CPU: compiled with GANGLINE_SOURCE (file), GANGLINE_KERNEL (name) and what the
// source itself wants, together with fibers.cpp. No result is null; else the message names what the kernel did wrong.
#include <utility>

#include <ptx.cuh>
#include GANGLINE_SOURCE

namespace {

template <class... Args, std::size_t... Index>
void call(void (*kernel)(Args...), void** args, std::index_sequence<Index...>) {
  kernel(*static_cast<Args*>(args[Index])...);
}

template <class... Args>
void call(void (*kernel)(Args...), void** args) {
  call(kernel, args, std::index_sequence_for<Args...>{});
}

void start(void** args) { call(GANGLINE_KERNEL, args); }

}  // namespace

extern "C" const char* emulated_run(int grid_x, int grid_y, int threads, std::size_t shared_bytes, int late,
                                    unsigned seed, void** args, const void* const* starts, const std::size_t* bytes,
                                    int ranges) {
  return emulated::run(start, grid_x, grid_y, threads, shared_bytes, late != 0, seed, args, starts, bytes, ranges);
}
