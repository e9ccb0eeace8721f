// Numbered tasks for the workers of one parallel call. Each worker has a range of its own, so that it reads matrices whose rows
// follow each other from task to task as one stream of bytes; who has ended takes what others have left.
#pragma once

#include <atomic>
#include <memory>

#include "threads.hpp"

namespace gangline {

class TaskRanges {
public:
    // By one worker, before all others pass a barrier.
    void plan(int tasks, int workers) {
        if (workers > room_) {
            ranges_ = std::make_unique<Tasks[]>(static_cast<std::size_t>(workers));
            room_ = workers;
        }
        workers_ = workers;
        for (int w = 0; w < workers; ++w) {
            const Range mine = share(tasks, 1, w, workers);
            ranges_[static_cast<std::size_t>(w)].end = mine.end;
            ranges_[static_cast<std::size_t>(w)].next.store(mine.begin, std::memory_order_relaxed);
        }
    }

    // The next task, or -1 when there is none left.
    int take(int worker) {
        for (int i = 0; i < workers_; ++i) {
            Tasks& tasks = ranges_[static_cast<std::size_t>((worker + i) % workers_)];
            if (tasks.next.load(std::memory_order_relaxed) >= tasks.end) continue;
            const int task = tasks.next.fetch_add(1, std::memory_order_relaxed);
            if (task < tasks.end) return task;
        }
        return -1;
    }

private:
    struct alignas(64) Tasks {
        std::atomic<int> next{0};
        int end = 0;
    };
    std::unique_ptr<Tasks[]> ranges_;
    int room_ = 0, workers_ = 0;
};

}  // namespace gangline
