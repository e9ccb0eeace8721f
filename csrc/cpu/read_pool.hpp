// Reads of expert bytes that no interpreter has to start, check or be told of at once: a queue of tickets, each some chunks,
// served by threads of its own. Whoever needs bytes takes what has ended, or waits for a change.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <utility>
#include <vector>

namespace gangline {

// One read of `length` bytes at `offset` to `to`, of which `wanted` must exist.
struct ReadChunk {
    int file = 0;
    std::int64_t offset = 0;
    std::size_t length = 0, wanted = 0;
    std::uint8_t* to = nullptr;
};

// What a ticket's bytes must give: the CRC-32 of some parts of memory, one after another.
struct Checksum {
    std::vector<std::pair<const std::uint8_t*, std::size_t>> parts;
    std::uint32_t expected = 0;
};

// A ticket whose chunks have all been read, or have failed.
struct TicketDone {
    static constexpr int ended = -1, differs = -2;
    std::int64_t ticket = 0;
    int error = 0;            // errno of the first failure; `ended`: a file ends too early; `differs`: the checksum; 0: none
    int file = 0;             // where it failed
    std::int64_t offset = 0;
    std::int64_t missing = 0;  // bytes
};

class ReadPool {
public:
    // `descriptors` of the files; `warm`: the same files opened through the page cache, from which bytes are taken that are
    // there already, or none. `align`: what chunks are multiples of. With no threads somebody must call work().
    ReadPool(std::vector<int> descriptors, std::vector<int> warm, std::size_t align, int threads);
    ~ReadPool();
    ReadPool(const ReadPool&) = delete;
    ReadPool& operator=(const ReadPool&) = delete;

    // Reads with so many threads more.
    void add(int threads);
    // Queues a read. Lower priorities go first, among equals the older.
    void submit(std::int64_t ticket, int priority, std::vector<ReadChunk> chunks, Checksum checksum);
    // Changes the urgency of a read; chunks that are under way finish as they are. False if all have begun.
    bool change(std::int64_t ticket, int priority);
    // Drops a read of which no chunk has begun; false if it is too late.
    bool cancel(std::int64_t ticket);
    // Takes the tickets that have ended since the last call.
    std::vector<TicketDone> finished();
    // Ends of tickets and pokes so far.
    std::uint64_t changes();
    // Waits until that is another number, for a fifth of a second at most: whoever waits must be able to look at other things.
    void wait(std::uint64_t seen);
    void poke();
    // Reads chunks, always the next of the most urgent ticket, until one completes its ticket. False after close().
    bool work();
    // Ends the threads after the chunks under way; no byte is written afterwards.
    void close();

private:
    struct Ticket {
        std::vector<ReadChunk> chunks;
        Checksum checksum;
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
    std::condition_variable work_, changed_;
    std::priority_queue<Entry> queue_;
    std::map<std::int64_t, std::unique_ptr<Ticket>> tickets_;
    std::vector<TicketDone> finished_;
    std::uint64_t changes_ = 0;
    std::int64_t submitted_ = 0;
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace gangline
