// Shows the pool of reads to Python.

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "read_pool.hpp"

namespace nb = nanobind;

namespace gangline {

#if defined(__unix__) || defined(__APPLE__)

namespace {

using Chunk = std::tuple<int, std::int64_t, std::size_t, std::size_t, std::size_t>;
using Part = std::pair<std::size_t, std::size_t>;
using Done = std::tuple<std::int64_t, int, int, std::int64_t, std::int64_t>;

void submit(ReadPool& pool, std::int64_t ticket, int priority, std::uintptr_t to, const std::vector<Chunk>& chunks,
            const std::vector<Part>& checked, std::uint32_t crc) {
    std::uint8_t* const begin = reinterpret_cast<std::uint8_t*>(to);
    std::vector<ReadChunk> reads;
    reads.reserve(chunks.size());
    for (const auto& [file, offset, length, wanted, place] : chunks) reads.push_back({file, offset, length, wanted, begin + place});
    Checksum checksum{{}, crc};
    for (const auto& [place, length] : checked) checksum.parts.emplace_back(begin + place, length);
    pool.submit(ticket, priority, std::move(reads), std::move(checksum));
}

std::vector<Done> finished(ReadPool& pool) {
    std::vector<Done> out;
    for (const TicketDone& done : pool.finished()) out.emplace_back(done.ticket, done.error, done.file, done.offset, done.missing);
    return out;
}

}  // namespace

void bind_reads(nb::module_& m) {
    using released = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<ReadPool>(m, "ReadPool", "Reads that no interpreter has to start.")
        .def(nb::init<std::vector<int>, std::vector<int>, std::size_t, int>(), nb::arg("descriptors"), nb::arg("warm"),
             nb::arg("align"), nb::arg("threads"))
        .def("add", &ReadPool::add, nb::arg("threads"), "Read with so many threads more.")
        .def("submit", &submit, nb::arg("ticket"), nb::arg("priority"), nb::arg("to"), nb::arg("chunks"), nb::arg("checked"),
             nb::arg("crc"),
             "Queue a read of chunks (file, offset, length, wanted, place) to the address `to` + place. The CRC-32 of the parts "
             "`checked` (place, length) must be `crc`.")
        .def("change", &ReadPool::change, nb::arg("ticket"), nb::arg("priority"))
        .def("cancel", &ReadPool::cancel, nb::arg("ticket"), "Drop a read that has not begun; False if it is too late.")
        .def("finished", &finished,
             "Take the tickets that have ended, each with its errno (-1: the file ends too early, -2: the checksum differs, 0: "
             "none), and the file, the offset and the missing bytes of a failure.")
        .def("changes", &ReadPool::changes, "Ends of tickets and pokes so far.")
        .def("wait", &ReadPool::wait, nb::arg("seen"), released(), "Wait until that is another number, or for 0.2 s.")
        .def("poke", &ReadPool::poke)
        .def("work", &ReadPool::work, released(), "Read until a ticket is complete, in this thread; False after close.")
        .def("close", &ReadPool::close, released());
}

#else

void bind_reads(nb::module_&) {}

#endif

}  // namespace gangline
