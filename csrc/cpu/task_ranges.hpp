// Numbered tasks for the workers of one parallel call. Each worker has a range of its own, so that it reads matrices whose rows
// follow each other from task to task as one stream of bytes; who has ended takes what others have left.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

#include "threads.hpp"

namespace gangline {

class TaskRanges {
public:
    // By one worker, while nobody takes tasks: nothing is taken yet.
    void restart(int workers) {
        if (workers > room_) {
            taken_ = std::make_unique<Count[]>(static_cast<std::size_t>(workers));
            room_ = workers;
        }
        for (int w = 0; w < workers; ++w) taken_[static_cast<std::size_t>(w)].tasks.store(0, std::memory_order_relaxed);
    }

    // The next of so many tasks, or -1 when there is none left. All workers give the same numbers.
    int take(int tasks, int worker, int workers) {
        for (int i = 0; i < workers; ++i) {
            const int owner = (worker + i) % workers;
            const Range range = share(tasks, 1, owner, workers);
            std::atomic<int>& taken = taken_[static_cast<std::size_t>(owner)].tasks;
            if (range.begin + taken.load(std::memory_order_relaxed) >= range.end) continue;
            const int task = range.begin + taken.fetch_add(1, std::memory_order_relaxed);
            if (task < range.end) return task;
        }
        return -1;
    }

private:
    struct alignas(64) Count {
        std::atomic<int> tasks{0};
    };
    std::unique_ptr<Count[]> taken_;
    int room_ = 0;
};

}  // namespace gangline
