"""Reader threads: a priority queue of expert reads, served chunk by chunk.

A read is cut into chunks of at most 4 MiB. Threads always take the next chunk of the most urgent read, so a
demand miss waits for at most one chunk per thread of whatever was queued before it, and one expert is read by
several threads at once when it is alone.

Nobody is called when a read ends: whoever needs its bytes takes what has ended, or waits for a change. With
the native core the threads never touch Python, so that neither a read nor a computation waits for the
interpreter's lock. Without it they do the same in Python.
"""

import heapq
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from gangline.core.errors import GanglineError
from gangline.core.tiers import Priority
from gangline.kernels.cpu import native
from gangline.kernels.cpu.checksum import crc32
from gangline.runtime.files import ExpertFiles
from gangline.runtime.read_plan import ReadPlan

_DIFFERS = -2


class Ticket:
    """One expert on its way. ``priority`` may change while it is queued; ``asked`` is what it began with.

    Args:
        plan: what is read.
        view: the slot's bytes, and address: where they lie.
        priority: its urgency.
        on_done: what the store does once it is taken from the finished ones.
        crc: CRC-32 that its fields must have, one after another; None leaves them unchecked.

    Attributes:
        error: why it could not be read. corrupt: whether ``crc`` differs.
    """

    __slots__ = (
        "address",
        "asked",
        "corrupt",
        "crc",
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
        crc: int | None = None,
    ) -> None:
        self.plan = plan
        self.view, self.address = view, address
        self.priority = self.asked = priority
        self.on_done = on_done
        self.crc, self.corrupt = crc, False
        self.number = -1  # of the native pool
        self.cursor = 0
        self.pending = len(plan.chunks)
        self.error: GanglineError | None = None


class Readers:
    """A pool of threads that read tickets.

    Attributes:
        submit: queue a read.
        change: change the urgency of a read; chunks that are under way finish as they are.
        cancel: drop a read of which no chunk has started; False if it is too late.
        finished: take the tickets that have ended since the last call.
        changes: how many tickets and pokes there were so far.
        wait: until that is another number, or a moment has passed.
        poke: wake all who wait.
        add: read with so many threads more.
        close: stop the threads after the chunks under way.
    """

    def __init__(self, files: ExpertFiles, threads: int) -> None:
        core = native()
        pool: NativeReads | PythonReads = (
            PythonReads(files, threads)
            if core is None or not hasattr(core, "ReadPool")
            else NativeReads(files, core, threads)
        )
        self.submit, self.change, self.cancel = pool.submit, pool.change, pool.cancel
        self.finished, self.changes, self.wait, self.poke = pool.finished, pool.changes, pool.wait, pool.poke
        self.close, self.add = pool.close, pool.add


class NativeReads:
    """Reads by the native core's pool."""

    def __init__(self, files: ExpertFiles, core: Any, threads: int) -> None:
        self._files = files
        self._pool = core.ReadPool(*files.descriptors(), files.align, threads)
        self._numbers = itertools.count()
        self._tickets: dict[int, Ticket] = {}
        self.changes, self.wait, self.poke = self._pool.changes, self._pool.wait, self._pool.poke
        self.work, self.add = self._pool.work, self._pool.add  # work: with no threads, in the caller's
        # Also where nobody closes it: slots must outlive what is being read into them.
        self.close: Callable[[], object] = weakref.finalize(self, self._pool.close)

    def submit(self, ticket: Ticket) -> None:
        """Queue a read."""
        number = ticket.number = next(self._numbers)
        self._tickets[number] = ticket
        plan = ticket.plan
        checked, crc = ((), 0) if ticket.crc is None else (plan.fields, ticket.crc)
        self._pool.submit(number, int(ticket.priority), ticket.address, plan.chunks, checked, crc)

    def change(self, ticket: Ticket, priority: Priority) -> None:
        """Change the urgency of a read."""
        if priority != ticket.priority and self._pool.change(ticket.number, int(priority)):
            ticket.priority = priority

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read of which no chunk has started."""
        dropped: bool = self._pool.cancel(ticket.number)
        if dropped:
            del self._tickets[ticket.number]
        return dropped

    def finished(self) -> list[Ticket]:
        """Take what has ended."""
        return [self._ended(*done) for done in self._pool.finished()]

    def _ended(self, number: int, code: int, file: int, offset: int, missing: int) -> Ticket:
        ticket = self._tickets.pop(number)
        if code == _DIFFERS:
            ticket.corrupt = True
        elif code:
            ticket.error = self._files.failure(file, code, offset, missing)
        return ticket


class PythonReads:
    """The same in Python."""

    def __init__(self, files: ExpertFiles, threads: int) -> None:
        self._files = files
        self._queue: list[tuple[int, int, Ticket]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._changed = threading.Condition(self._lock)
        self._changes = 0
        self._finished: list[Ticket] = []
        self._closed = False
        self._threads: list[threading.Thread] = []
        self.add(threads)

    def add(self, threads: int) -> None:
        """Read with so many threads more."""
        for _ in range(threads):
            name = f"gangline-reader-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
            self._threads[-1].start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a read."""
        with self._lock:
            heapq.heappush(self._queue, (ticket.priority, next(self._order), ticket))
            self._work.notify(len(ticket.plan.chunks))

    def change(self, ticket: Ticket, priority: Priority) -> None:
        """Change the urgency of a read."""
        with self._lock:
            if priority != ticket.priority and ticket.cursor < len(ticket.plan.chunks):
                ticket.priority = priority
                heapq.heappush(self._queue, (priority, next(self._order), ticket))

    def cancel(self, ticket: Ticket) -> bool:
        """Drop a read of which no chunk has started."""
        with self._lock:
            if ticket.cursor:
                return False
            ticket.cursor = len(ticket.plan.chunks)
            return True

    def finished(self) -> list[Ticket]:
        """Take what has ended."""
        with self._lock:
            ended, self._finished = self._finished, []
            return ended

    def changes(self) -> int:
        """Count what waiting threads may want to know of."""
        return self._changes

    def wait(self, seen: int) -> None:
        """Wait until there are more changes than were seen, or for 0.2 s."""
        with self._lock:
            if self._changes == seen:
                self._changed.wait(0.2)

    def poke(self) -> None:
        """Wake all who wait."""
        with self._lock:
            self._changes += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the threads after the chunks under way."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._work.notify_all()
        self.poke()
        for thread in self._threads:
            thread.join()

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
                self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        if ticket.crc is not None and ticket.error is None:
            crc = 0
            for place, nbytes in ticket.plan.fields:
                crc = crc32(ticket.view[place : place + nbytes], crc)
            ticket.corrupt = crc != ticket.crc
        with self._lock:
            self._finished.append(ticket)
        self.poke()

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
