"""Reader threads: a priority queue of expert reads, served chunk by chunk.

A read is cut into chunks of at most 4 MiB. Threads always take the next chunk of the most urgent read, so a
demand miss waits for at most one chunk per thread of whatever was queued before it, and one expert is read by
several threads at once when it is alone.

With the native core the threads wait, choose and read in it: a read then starts at once, whatever Python is
busy with. Without it they do so here.
"""

import heapq
import itertools
import threading
from collections.abc import Callable
from typing import Any

from gangline.core.errors import GanglineError
from gangline.core.tiers import Priority
from gangline.kernels.cpu import native
from gangline.runtime.files import ExpertFiles
from gangline.runtime.read_plan import ReadPlan


class Ticket:
    """One expert on its way. ``priority`` may change while it is queued; ``asked`` is what it began with.

    Args:
        plan: what is read.
        view: the slot's bytes, and address: where they lie.
        priority: its urgency.
        on_done: called in a reader thread after the last chunk.
    """

    __slots__ = (
        "address",
        "asked",
        "cursor",
        "error",
        "number",
        "on_done",
        "pending",
        "plan",
        "priority",
        "view",
    )

    def __init__(
        self,
        plan: ReadPlan,
        view: memoryview,
        address: int,
        priority: Priority,
        on_done: Callable[["Ticket"], None],
    ) -> None:
        self.plan = plan
        self.view, self.address = view, address
        self.priority = self.asked = priority
        self.on_done = on_done
        self.number = -1  # of the native pool
        self.cursor = 0
        self.pending = len(plan.chunks)
        self.error: GanglineError | None = None


class Readers:
    """A pool of threads that read tickets; ``on_done`` runs in a reader thread after the last chunk."""

    def __init__(self, files: ExpertFiles, threads: int) -> None:
        core = native()
        self._pool: NativeReads | PythonReads = (
            PythonReads(files) if core is None or not hasattr(core, "ReadPool") else NativeReads(files, core)
        )
        self.submit, self.change, self.cancel = self._pool.submit, self._pool.change, self._pool.cancel
        self._threads: list[threading.Thread] = []
        self.add(threads)

    def add(self, threads: int) -> None:
        """Read with so many threads more."""
        for _ in range(threads):
            name = f"gangline-reader-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Stop the threads after the chunks under way."""
        self._pool.close()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (ticket := self._pool.work()) is not None:
            ticket.on_done(ticket)


class NativeReads:
    """Reads by the native core's pool."""

    def __init__(self, files: ExpertFiles, core: Any) -> None:
        self._files = files
        self._pool = core.ReadPool(*files.descriptors(), files.align)
        self._numbers = itertools.count()
        self._tickets: dict[int, Ticket] = {}

    def submit(self, ticket: Ticket) -> None:
        """Queue a read."""
        ticket.number = next(self._numbers)
        self._tickets[ticket.number] = ticket
        chunks = [(c.file, c.offset, c.length, c.wanted, c.place) for c in ticket.plan.chunks]
        self._pool.submit(ticket.number, int(ticket.priority), ticket.address, chunks)

    def change(self, ticket: Ticket, priority: Priority) -> None:
        """Change the urgency of a read; chunks that are under way finish as they are."""
        if priority != ticket.priority and self._pool.change(ticket.number, int(priority)):
            ticket.priority = priority

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read of which no chunk has started; False if it is too late."""
        dropped: bool = self._pool.cancel(ticket.number)
        if dropped:
            del self._tickets[ticket.number]
        return dropped

    def work(self) -> Ticket | None:
        """Read until a ticket is complete and return it; None after :meth:`close`."""
        done = self._pool.work()
        if done is None:
            return None
        number, code, file, offset, missing = done
        ticket = self._tickets.pop(number)
        if code:
            ticket.error = self._files.failure(file, code, offset, missing)
        return ticket

    def close(self) -> None:
        """Let every :meth:`work` return after its chunk."""
        self._pool.close()


class PythonReads:
    """The same in Python."""

    def __init__(self, files: ExpertFiles) -> None:
        self._files = files
        self._queue: list[tuple[int, int, Ticket]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._closed = False

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
        """Let every :meth:`work` return after its chunk."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()

    def work(self) -> Ticket | None:
        """Read until a ticket is complete and return it; None after :meth:`close`."""
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
                return ticket
        return None

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
