// Reads of expert bytes that no interpreter has to start: a queue of tickets, each some chunks, served by threads that call
// work().
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <queue>
#include <vector>

namespace gangline {

// One read of `length` bytes at `offset` to `to`, of which `wanted` must exist.
struct ReadChunk {
    int file = 0;
    std::int64_t offset = 0;
    std::size_t length = 0, wanted = 0;
    std::uint8_t* to = nullptr;
};

// A ticket whose chunks have all been read, or have failed.
struct TicketDone {
    std::int64_t ticket = 0;
    int error = 0;            // errno of the first failure, -1 where a file ends too early, 0 for none
    int file = 0;             // where it failed
    std::int64_t offset = 0;
    std::int64_t missing = 0;  // bytes
};

class ReadPool {
public:
    // `descriptors` of the files; `warm`: the same files opened through the page cache, from which bytes are taken that are
    // there already, or none. `align`: what chunks are multiples of.
    ReadPool(std::vector<int> descriptors, std::vector<int> warm, std::size_t align);

    // Queues a read. Lower priorities go first, among equals the older.
    void submit(std::int64_t ticket, int priority, std::vector<ReadChunk> chunks);
    // Changes the urgency of a read; chunks that are under way finish as they are. False if all have begun.
    bool change(std::int64_t ticket, int priority);
    // Drops a read of which no chunk has begun; false if it is too late.
    bool cancel(std::int64_t ticket);
    // Reads chunks, always the next of the most urgent ticket, until one completes its ticket. None after close().
    std::optional<TicketDone> work();
    // Lets every work() return after its chunk.
    void close();

private:
    struct Ticket {
        std::vector<ReadChunk> chunks;
        int priority = 0;
        std::size_t begun = 0, pending = 0;
        TicketDone done;
    };
    struct Entry {
        int priority;
        std::int64_t order, ticket;
        bool operator<(const Entry& other) const {  // the largest is served first
            return priority != other.priority ? priority > other.priority : order > other.order;
        }
    };

    Ticket* most_urgent();
    void read(const ReadChunk& chunk, TicketDone& failure) const;
    std::size_t read_warm(const ReadChunk& chunk) const;

    const std::vector<int> descriptors_, warm_;
    const std::size_t align_;
    std::mutex mutex_;
    std::condition_variable work_;
    std::priority_queue<Entry> queue_;
    std::map<std::int64_t, std::unique_ptr<Ticket>> tickets_;
    std::int64_t submitted_ = 0;
    bool closed_ = false;
};

}  // namespace gangline
