// A pool whose workers spin for some tens of microseconds after a piece of work, because the next one usually follows at
// once, and sleep after that, because torch's own threads want the cores too.

#include "threads.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#define GANGLINE_POSIX 1
#include <pthread.h>
#include <csignal>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace gangline {
namespace {

using Clock = std::chrono::steady_clock;
using Body = std::function<void(int, int)>;

constexpr auto idle_spin = std::chrono::microseconds(60);
// A wait that lasts longer than this has lost its partner to the scheduler, on a machine with other work: let others run,
// and after some tries sleep, or the wait itself keeps the partner from its core.
constexpr int spins_before_yield = 4096;
constexpr int yields_before_sleep = 64;
constexpr auto nap = std::chrono::microseconds(20);

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <class Done>
void spin_until(Done done) {
    for (int i = 0; !done(); ++i) {
        if (i < spins_before_yield) {
            relax();
        } else if (i < spins_before_yield + yields_before_sleep) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(nap);
        }
    }
}

// Signals belong to the interpreter's threads: a worker inherits a mask that blocks them all.
class BlockSignals {
#if defined(GANGLINE_POSIX)
public:
    BlockSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
#endif
};

// Zero where the system does not say.
int all_cores() {
    const unsigned cores = std::thread::hardware_concurrency();
    return cores == 0 ? 1 : static_cast<int>(cores);
}

// Keeps workers off each other's processors. A scheduler may leave two threads that wait for each other on one processor
// beside an idle one for seconds: neither is ever asleep long enough to be placed anew.
class Places {
public:
    void resize(int threads) { taken_ = std::vector<std::atomic<int>>(static_cast<std::size_t>(threads)); }

    void note_caller() { taken_[0].store(here(), std::memory_order_relaxed); }

    // Moves the calling worker when the caller, or a worker before it, runs where it does; later moves stay free.
    void settle(int worker) {
#if defined(__linux__)
        const int mine = here();
        bool shared = false;
        for (int w = 0; w < worker; ++w) shared |= taken_[static_cast<std::size_t>(w)].load(std::memory_order_relaxed) == mine;
        if (shared) move(worker);
#endif
        taken_[static_cast<std::size_t>(worker)].store(here(), std::memory_order_relaxed);
    }

private:
#if defined(__linux__)
    static int here() { return sched_getcpu(); }

    void move(int worker) {
        cpu_set_t allowed, free;
        if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
        free = allowed;
        for (int w = 0; w < worker; ++w) {
            const int cpu = taken_[static_cast<std::size_t>(w)].load(std::memory_order_relaxed);
            if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_CLR(cpu, &free);
        }
        if (CPU_COUNT(&free) == 0 || sched_setaffinity(0, sizeof(free), &free) != 0) return;
        sched_setaffinity(0, sizeof(allowed), &allowed);
    }
#else
    static int here() { return -1; }
#endif

    std::vector<std::atomic<int>> taken_;
};

class Pool {
public:
    void set_size(int size) { wanted_.store(size < 1 ? 1 : size); }
    int size() const { return wanted_.load(); }

    void run(const Body& body) {
        const std::lock_guard<std::mutex> one_caller(callers_);
        resize(wanted_.load());
        if (size_ == 1) {
            body(0, 1);
            return;
        }
        body_ = &body;
        places_.note_caller();
        running_.store(size_ - 1, std::memory_order_relaxed);
        publish();
        body(0, size_);
        spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
    }

    void meet() {
        if (size_ == 1) return;
        const std::uint32_t round = round_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            waiting_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            spin_until([this, round] { return round_.load(std::memory_order_acquire) != round; });
        }
    }

private:
    void publish() {
        turn_.fetch_add(1, std::memory_order_seq_cst);
        // The system call is made only when someone sleeps: a sleeper counts itself before it looks at the turn again.
        if (sleepers_.load(std::memory_order_seq_cst) > 0) turn_.notify_all();
    }

    void resize(int size) {
        if (size == size_) return;
        if (!workers_.empty()) {
            stop_ = true;
            publish();
            for (std::thread& worker : workers_) worker.join();
            workers_.clear();
            stop_ = false;
        }
        size_ = size;
        places_.resize(size);
        const BlockSignals blocked;
        for (int worker = 1; worker < size; ++worker) {
            workers_.emplace_back([this, worker, turn = turn_.load()] { work(worker, turn); });
        }
    }

    void work(int worker, std::uint32_t turn) {
        for (;;) {
            turn = next_turn(turn);
            if (stop_) return;
            places_.settle(worker);
            (*body_)(worker, size_);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::uint32_t next_turn(std::uint32_t turn) {
        const auto end = Clock::now() + idle_spin;
        do {
            for (int i = 0; i < 16; ++i) {
                const std::uint32_t now = turn_.load(std::memory_order_acquire);
                if (now != turn) return now;
                relax();
            }
        } while (Clock::now() < end);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        turn_.wait(turn, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        return turn_.load(std::memory_order_acquire);
    }

    std::mutex callers_;
    std::atomic<int> wanted_{all_cores()};
    int size_ = 1;
    bool stop_ = false;  // written by the caller before it publishes a turn
    std::vector<std::thread> workers_;
    const Body* body_ = nullptr;
    Places places_;
    // Lines of their own: each is written while others spin on a different one.
    alignas(64) std::atomic<std::uint32_t> turn_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<int> running_{0};
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<std::uint32_t> round_{0};
};

// Never destroyed: workers may still sleep in it when the process ends, and a forked child leaves its parent's behind.
Pool* current = nullptr;

#if defined(GANGLINE_POSIX)
// A forked child has the calling thread alone. The old pool's threads and locks are not its own: start afresh.
void after_fork_in_child() {
    const int size = current->size();
    current = new Pool;
    current->set_size(size);
}
#endif

Pool& pool() {
    static const bool made = [] {
        current = new Pool;
#if defined(GANGLINE_POSIX)
        pthread_atfork(nullptr, nullptr, after_fork_in_child);
#endif
        return true;
    }();
    static_cast<void>(made);
    return *current;
}

}  // namespace

void set_threads(int threads) { pool().set_size(threads); }

int threads() { return pool().size(); }

void parallel(const Body& body) { pool().run(body); }

void barrier() { pool().meet(); }

Range share(int count, int grain, int worker, int workers) {
    const std::int64_t units = (static_cast<std::int64_t>(count) + grain - 1) / grain;
    const auto cut = [&](int i) {
        const std::int64_t at = units * i / workers * grain;
        return static_cast<int>(at < count ? at : count);
    };
    return {cut(worker), cut(worker + 1)};
}

}  // namespace gangline
