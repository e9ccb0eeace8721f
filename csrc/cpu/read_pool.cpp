#include "read_pool.hpp"

#if defined(__unix__) || defined(__APPLE__)

#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <utility>

#include "checksum.hpp"

namespace gangline {
namespace {

bool holds(const Checksum& checksum) {
    std::uint32_t found = 0;
    for (const auto& [bytes, count] : checksum.parts) found = crc32(found, bytes, count);
    return found == checksum.expected;
}

}  // namespace

ReadPool::ReadPool(std::vector<int> descriptors, std::vector<int> warm, std::size_t align, int threads)
    : descriptors_(std::move(descriptors)), warm_(std::move(warm)), align_(align) {
    add(threads);
}

ReadPool::~ReadPool() { close(); }

void ReadPool::add(int threads) {
    for (int i = 0; i < threads; ++i)
        threads_.emplace_back([this] {
            while (work()) {
            }
        });
}

void ReadPool::submit(std::int64_t ticket, int priority, std::vector<ReadChunk> chunks, Checksum checksum) {
    const std::size_t count = chunks.size();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto made = std::make_unique<Ticket>();
        made->chunks = std::move(chunks);
        made->checksum = std::move(checksum);
        made->priority = priority;
        made->pending = count;
        made->done.ticket = ticket;
        tickets_[ticket] = std::move(made);
        queue_.push({priority, submitted_++, ticket});
    }
    for (std::size_t i = 0; i < count; ++i) work_.notify_one();
}

bool ReadPool::change(std::int64_t ticket, int priority) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tickets_.find(ticket);
    if (found == tickets_.end() || found->second->begun == found->second->chunks.size()) return false;
    if (found->second->priority != priority) {
        found->second->priority = priority;
        queue_.push({priority, submitted_++, ticket});
    }
    return true;
}

bool ReadPool::cancel(std::int64_t ticket) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tickets_.find(ticket);
    if (found == tickets_.end() || found->second->begun > 0) return false;
    tickets_.erase(found);
    return true;
}

std::vector<TicketDone> ReadPool::finished() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(finished_, {});
}

std::uint64_t ReadPool::changes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return changes_;
}

void ReadPool::wait(std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, std::chrono::milliseconds(200), [&] { return changes_ != seen; });
}

void ReadPool::poke() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++changes_;
    }
    changed_.notify_all();
}

void ReadPool::close() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        ++changes_;
    }
    work_.notify_all();
    changed_.notify_all();
    for (std::thread& thread : threads_)
        if (thread.joinable()) thread.join();
}

// The ticket to serve next, or none; entries of tickets that were cancelled, changed or begun to the end are dropped.
ReadPool::Ticket* ReadPool::most_urgent() {
    while (!queue_.empty()) {
        const Entry& first = queue_.top();
        const auto found = tickets_.find(first.ticket);
        if (found != tickets_.end() && found->second->priority == first.priority &&
            found->second->begun < found->second->chunks.size())
            return found->second.get();
        queue_.pop();
    }
    return nullptr;
}

bool ReadPool::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        Ticket* ticket = nullptr;
        work_.wait(lock, [&] { return closed_ || (ticket = most_urgent()) != nullptr; });
        if (closed_) return false;
        const ReadChunk& chunk = ticket->chunks[ticket->begun++];  // a ticket stays until its last chunk has ended
        lock.unlock();
        TicketDone failure;
        read(chunk, failure);
        lock.lock();
        if (failure.error != 0 && ticket->done.error == 0) {
            failure.ticket = ticket->done.ticket;
            ticket->done = failure;
        }
        if (--ticket->pending > 0) continue;
        if (ticket->done.error == 0 && !ticket->checksum.parts.empty()) {
            lock.unlock();
            const bool right = holds(ticket->checksum);
            lock.lock();
            if (!right) ticket->done.error = TicketDone::differs;
        }
        finished_.push_back(ticket->done);
        tickets_.erase(ticket->done.ticket);
        ++changes_;
        lock.unlock();
        changed_.notify_all();
        return true;
    }
}

void ReadPool::read(const ReadChunk& chunk, TicketDone& failure) const {
    std::size_t done = warm_.empty() ? 0 : read_warm(chunk);
    const int descriptor = descriptors_[static_cast<std::size_t>(chunk.file)];
    while (done < chunk.wanted) {
        const ssize_t count = pread(descriptor, chunk.to + done, chunk.length - done, chunk.offset + static_cast<off_t>(done));
        if (count > 0) {
            done += static_cast<std::size_t>(count);
            continue;
        }
        if (count < 0 && errno == EINTR) continue;
        failure.error = count < 0 ? errno : TicketDone::ended;
        failure.file = chunk.file;
        failure.offset = chunk.offset + static_cast<std::int64_t>(done);
        failure.missing = static_cast<std::int64_t>(chunk.wanted - done);
        return;
    }
}

// Bytes that the page cache gave without waiting: all, or a multiple of the alignment.
std::size_t ReadPool::read_warm([[maybe_unused]] const ReadChunk& chunk) const {
#if defined(RWF_NOWAIT)
    const iovec target{chunk.to, chunk.length};
    const ssize_t count = preadv2(warm_[static_cast<std::size_t>(chunk.file)], &target, 1, chunk.offset, RWF_NOWAIT);
    if (count <= 0) return 0;  // nothing there, or a file system that cannot say
    const std::size_t read = static_cast<std::size_t>(count);
    return read >= chunk.wanted ? read : read - read % align_;
#else
    return 0;
#endif
}

}  // namespace gangline

#endif
