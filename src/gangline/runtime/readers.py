"""Reader threads: a priority queue of expert reads, served chunk by chunk.

A read is cut into chunks of at most 4 MiB. Threads always take the next chunk of the most urgent read, so a
demand miss waits for at most one chunk per thread of whatever was queued before it, and one expert is read by
several threads at once when it is alone.
"""

import heapq
import itertools
import threading
from collections.abc import Callable

from gangline.core.errors import GanglineError
from gangline.core.tiers import Priority
from gangline.runtime.files import ExpertFiles
from gangline.runtime.read_plan import ReadPlan


class Ticket:
    """One expert on its way. ``priority`` may change while it is queued; ``asked`` is what it began with."""

    __slots__ = ("asked", "cursor", "error", "on_done", "pending", "plan", "priority", "view")

    def __init__(
        self, plan: ReadPlan, view: memoryview, priority: Priority, on_done: Callable[["Ticket"], None]
    ) -> None:
        self.plan = plan
        self.view = view
        self.priority = self.asked = priority
        self.on_done = on_done
        self.cursor = 0
        self.pending = len(plan.chunks)
        self.error: GanglineError | None = None


class Readers:
    """A pool of threads that read tickets; ``on_done`` runs in a reader thread after the last chunk."""

    def __init__(self, files: ExpertFiles, threads: int) -> None:
        self._files = files
        self._queue: list[tuple[int, int, Ticket]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"gangline-reader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a read."""
        with self._lock:
            heapq.heappush(self._queue, (ticket.priority, next(self._order), ticket))
            self._work.notify(len(ticket.plan.chunks))

    def change(self, ticket: Ticket, priority: Priority) -> None:
        """Change the urgency of a read; chunks that are under way finish as they are."""
        with self._lock:
            if priority != ticket.priority and ticket.cursor < len(ticket.plan.chunks):
                ticket.priority = priority
                heapq.heappush(self._queue, (priority, next(self._order), ticket))

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read of which no chunk has started; False if it is too late."""
        with self._lock:
            if ticket.cursor:
                return False
            ticket.cursor = len(ticket.plan.chunks)
            return True

    def close(self) -> None:
        """Stop the threads after the chunks under way."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> tuple[Ticket, int] | None:
        with self._lock:
            while True:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return None
                priority, _, ticket = self._queue[0]
                if ticket.cursor >= len(ticket.plan.chunks) or priority != ticket.priority:
                    heapq.heappop(self._queue)  # the older entry of a read that changed, or a cancelled one
                    continue
                ticket.cursor += 1
                return ticket, ticket.cursor - 1

    def _run(self) -> None:
        while (task := self._next()) is not None:
            ticket, index = task
            chunk = ticket.plan.chunks[index]
            try:
                target = ticket.view[chunk.place : chunk.place + chunk.length]
                self._files.read(chunk.file, chunk.offset, target, chunk.wanted)
            except GanglineError as error:
                ticket.error = error
            with self._lock:
                ticket.pending -= 1
                done = ticket.pending == 0
            if done:
                ticket.on_done(ticket)
