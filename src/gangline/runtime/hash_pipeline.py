"""SiDA's two threads: one builds hash tables ahead, the other computes (arXiv 2310.18859).

The hash thread takes batch after batch, builds each table and puts it into a queue of bounded size; it waits
while the queue is full. The inference thread, which is the caller's, takes the tables in order, has the
experts of each read, and runs the batch. With a bound of 1 the table of batch i+1 is made while batch i runs,
and as soon as it is made its experts are read too, into the slots that batch i has no more use for.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

from torch import Tensor

from gangline.core.errors import UsageError
from gangline.runtime.hash_routing import HashRouting, Prepared

Item = TypeVar("Item")
Made = TypeVar("Made")
Out = TypeVar("Out")

_POLL_SECONDS = 0.05


@dataclass
class PipelineTimes:
    """Where the time of a pipeline went, in seconds.

    Attributes:
        batches: that were run.
        hashing: of the hash thread in building tables.
        waiting: of the inference thread for tables.
        computing: of the inference thread in running batches.
    """

    batches: int = 0
    hashing: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0


class Ahead(Generic[Item, Made]):
    """Prepares items in a thread of its own and gives them out in order.

    Leaving the context (or exhausting the iterator) ends the thread. What goes wrong in it, in ``prepare`` or
    in ``items``, is raised where the item would have been given out.

    Args:
        items: taken in the thread, not before there is room for them.
        prepare: makes something of an item.
        bound: prepared items that wait at most.
        name: of the thread.

    Raises:
        UsageError: the bound is below 1.
    """

    def __init__(
        self, items: Iterable[Item], prepare: Callable[[Item], Made], bound: int, name: str = "hash"
    ) -> None:
        if bound < 1:
            raise UsageError(f"a queue of {bound} tables holds none; give 1 or more")
        self._items, self._prepare = items, prepare
        self._queue: Queue[tuple[str, Item | None, Made | None, BaseException | None]] = Queue(bound)
        self._stop = threading.Event()
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._work, name=f"gangline-{name}", daemon=True)

    def __enter__(self) -> Iterator[tuple[Item, Made]]:
        self._thread.start()
        return self._given_out()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(_POLL_SECONDS)

    def _given_out(self) -> Iterator[tuple[Item, Made]]:
        while True:
            kind, item, made, error = self._queue.get()
            if kind == "end":
                return
            if error is not None:
                raise error
            yield item, made  # type: ignore[misc]

    def _work(self) -> None:
        try:
            for item in self._items:
                started = time.perf_counter()
                made = self._prepare(item)
                self.seconds += time.perf_counter() - started
                if not self._put(("item", item, made, None)):
                    return
            self._put(("end", None, None, None))
        except BaseException as error:  # noqa: BLE001 - the thread that takes the tables must see it
            self._put(("error", None, None, error))

    def _put(self, entry: tuple[str, Item | None, Made | None, BaseException | None]) -> bool:
        """Wait for room; False if nobody takes from the queue any more."""
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False

    def _drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except Empty:
                return


class HashPipeline:
    """Runs batches through a model by tables that are made ahead.

    Args:
        routing: of the model, in either mode.
        bound: tables that wait at most (the paper: one batch ahead; the released code: 16).

    Attributes:
        times: of all runs so far.
    """

    def __init__(self, routing: HashRouting, bound: int = 1) -> None:
        self._routing, self._bound = routing, bound
        self.times = PipelineTimes()

    def run(self, batches: Iterable[Tensor], forward: Callable[[Tensor], Out]) -> Iterator[Out]:
        """Yield ``forward(ids)`` of every batch in order; whole texts, not continuations.

        Args:
            batches: token ids ``[B, S]``; taken in the hash thread.
            forward: runs the model once, over exactly these tokens. It is called in the caller's thread.

        Raises:
            Exception: whatever ``batches``, the hash function or ``forward`` raises; the hash thread is over
                by then.
        """

        def prepare(ids_BS: Tensor) -> Prepared:
            prepared = self._routing.prepare(ids_BS)
            self._routing.expect(prepared)
            return prepared

        ahead = Ahead(batches, prepare, self._bound)
        try:
            with ahead as tables:
                started = time.perf_counter()
                for ids_BS, prepared in tables:
                    ready = time.perf_counter()
                    self._routing.use(prepared)
                    out = forward(ids_BS)
                    done = time.perf_counter()
                    self.times.batches += 1
                    self.times.waiting += ready - started
                    self.times.computing += done - ready
                    yield out
                    started = time.perf_counter()
        finally:
            self._routing.forget()
            self.times.hashing += ahead.seconds
