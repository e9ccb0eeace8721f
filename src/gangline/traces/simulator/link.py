"""A link as a discrete-event resource: one transfer at a time, urgent ones first, chunk by chunk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gangline.core.tiers import Priority
from gangline.traces.simulator.machine import SimLink


@dataclass(eq=False)
class Transfer:
    """Bytes on their way.

    Attributes:
        nbytes: bytes in all; ``left`` those not moved yet.
        priority: class of the request; raised when an event comes to wait for it, lowered when its event
            did not want it. ``asked`` is what it was at first.
        earliest: when it may start.
        source: link and transfer that bring the bytes to where this one starts; None if they are there.
        done: when the last byte arrived, None before.
    """

    nbytes: int
    priority: Priority
    earliest: float = 0.0
    source: "tuple[Link, Transfer] | None" = None
    left: int = field(init=False)
    asked: Priority = field(init=False)
    done: float | None = None

    def __post_init__(self) -> None:
        self.left = self.nbytes
        self.asked = self.priority


class Link:
    """Serves transfers by priority, then in the order of request.

    Attributes:
        moved: bytes by priority class, counted when requested.
        busy: seconds in which bytes moved.
    """

    def __init__(self, spec: SimLink) -> None:
        self.spec = spec
        self.moved = dict.fromkeys(Priority, 0)
        self.busy = 0.0
        self.slow = False
        self._instant = math.isinf(spec.bytes_per_second) and spec.latency == 0
        self._clock = 0.0
        self._queue: list[Transfer] = []

    def submit(
        self, nbytes: int, priority: Priority, now: float, source: "tuple[Link, Transfer] | None" = None
    ) -> Transfer:
        """Queue a transfer at time ``now``, to start when ``source`` has brought the bytes."""
        self.advance(now)
        transfer = Transfer(nbytes, priority, now, source)
        self.moved[priority] += nbytes
        if self._instant and self._start(transfer, now) <= now:
            transfer.done, transfer.left = transfer.earliest, 0
            return transfer
        self._queue.append(transfer)
        return transfer

    def cancel(self, transfer: Transfer, now: float) -> bool:
        """Drop a transfer of which no byte has moved; False if it is too late."""
        self.advance(now)
        if transfer.left < transfer.nbytes or transfer not in self._queue:
            return False
        self._queue.remove(transfer)
        self.moved[transfer.asked] -= transfer.nbytes
        return True

    def advance(self, until: float) -> None:
        """Move bytes up to the time ``until``; a chunk that has begun is finished."""
        while self._clock < until and self._queue:
            self._one_chunk(until)
        self._clock = max(self._clock, until)

    def finish(self, transfer: Transfer) -> float:
        """Return when ``transfer`` arrives if nothing else is requested before; moves bytes up to then."""
        while transfer.done is None:
            self._one_chunk(math.inf)
        return transfer.done

    def finish_first(self, transfers: Sequence[Transfer]) -> Transfer:
        """Move bytes until one of ``transfers`` has arrived, and return it."""
        while True:
            for transfer in transfers:
                if transfer.done is not None:
                    return transfer
            self._one_chunk(math.inf)

    def _start(self, transfer: Transfer, horizon: float) -> float:
        """When a transfer may start, as far as that is known at ``horizon``; infinite if it is not."""
        if transfer.source is not None:
            link, before = transfer.source
            if before.done is None:
                if math.isinf(horizon):
                    link.finish(before)
                else:
                    link.advance(horizon)
            if before.done is None:
                return math.inf
            transfer.earliest, transfer.source = max(transfer.earliest, before.done), None
        return transfer.earliest

    def _one_chunk(self, until: float) -> None:
        ready = [t for t in self._queue if self._start(t, self._clock) <= self._clock]
        if not ready:
            self._clock = min(until, *(self._start(t, until) for t in self._queue))
            return
        transfer = min(ready, key=lambda t: t.priority)  # min keeps the first of equals: order of request
        # Without a rival the whole transfer is one piece.
        alone = len(self._queue) == 1 and until == math.inf
        nbytes = transfer.left if alone else min(transfer.left, self.spec.chunk_bytes)
        seconds = nbytes / (self.spec.bytes_per_second * (self.spec.contended if self.slow else 1.0))
        if transfer.left == transfer.nbytes:
            seconds += self.spec.latency
        self._clock += seconds
        self.busy += seconds
        transfer.left -= nbytes
        if transfer.left == 0:
            transfer.done = self._clock
            self._queue.remove(transfer)
