// Shows the pool of reads to Python.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "read_pool.hpp"

namespace nb = nanobind;

namespace gangline {

#if defined(__unix__) || defined(__APPLE__)

namespace {

using Chunk = std::tuple<int, std::int64_t, std::size_t, std::size_t, std::size_t>;
using Done = std::tuple<std::int64_t, int, int, std::int64_t, std::int64_t>;

void submit(ReadPool& pool, std::int64_t ticket, int priority, std::uintptr_t to, const std::vector<Chunk>& chunks) {
    std::vector<ReadChunk> reads;
    reads.reserve(chunks.size());
    for (const auto& [file, offset, length, wanted, place] : chunks)
        reads.push_back({file, offset, length, wanted, reinterpret_cast<std::uint8_t*>(to) + place});
    pool.submit(ticket, priority, std::move(reads));
}

std::optional<Done> work(ReadPool& pool) {
    std::optional<TicketDone> done;
    {
        const nb::gil_scoped_release released;
        done = pool.work();
    }
    if (!done) return std::nullopt;
    return Done{done->ticket, done->error, done->file, done->offset, done->missing};
}

}  // namespace

void bind_reads(nb::module_& m) {
    nb::class_<ReadPool>(m, "ReadPool", "Reads that no interpreter has to start.")
        .def(nb::init<std::vector<int>, std::vector<int>, std::size_t>(), nb::arg("descriptors"), nb::arg("warm"),
             nb::arg("align"))
        .def("submit", &submit, nb::arg("ticket"), nb::arg("priority"), nb::arg("to"), nb::arg("chunks"),
             "Queue a read of chunks (file, offset, length, wanted, place) to the address `to` + place.")
        .def("change", &ReadPool::change, nb::arg("ticket"), nb::arg("priority"))
        .def("cancel", &ReadPool::cancel, nb::arg("ticket"), "Drop a read that has not begun; False if it is too late.")
        .def("work", &work,
             "Read until a ticket is complete; return it, its errno (-1: the file ends too early, 0: none), and the file, the "
             "offset and the missing bytes of a failure. None after close().")
        .def("close", &ReadPool::close);
}

#else

void bind_reads(nb::module_&) {}

#endif

}  // namespace gangline
