// One pool of threads for everything native. The calling thread works too, as worker 0.
#pragma once

#include <functional>

namespace gangline {

// Threads that compute, the calling one included. Takes effect at the next parallel call; not to be called inside one.
void set_threads(int threads);
int threads();

// Calls body(worker) once on every worker, at the same time, and returns when all have come back. Workers may meet at
// barrier() in between. Calls from several Python threads are served one after another. A body must not throw.
void parallel(const std::function<void(int worker, int workers)>& body);

// Waits inside parallel() until every worker is here (spins: the waits are microseconds).
void barrier();

// The part of [0, count) that a worker takes when work is split evenly in units of `grain`.
struct Range {
    int begin = 0, end = 0;
};
Range share(int count, int grain, int worker, int workers);

}  // namespace gangline
