"""The experts of one routing event: hits leased, misses read, handed out as they can be computed."""

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gangline.core.errors import StoreError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.precision import Precision
from gangline.core.tiers import Priority
from gangline.runtime.slots import SlotState

if TYPE_CHECKING:
    from gangline.runtime.store import ExpertStore


class EventLease:
    """The experts of one routing event, leased until each has been computed.

    Iterate to get ``(expert, weights)``. By default hits come first and misses as they arrive; all hits are
    leased at once. ``in_order`` gives experts in ascending id, for sums that run as they come: leases then
    run ahead as far as there are slots, and hits that are not leased yet are not evicted for this event. What
    is handed out together is then a matter of slots, not of speed, so that which experts a prompt leaves
    behind depends on no clock. An
    expert's lease ends when the next one is asked for, so a prompt streams through few slots. Use as a
    context manager: leaving it, also by an exception, releases everything.

    Args:
        store: that holds the experts.
        event: which experts.
        in_order: see above.
        whole: the event that the cache policy is told of, where ``event`` is a part of it.
        chosen: how experts of ``whole`` are computed; None for all as they are.
    """

    def __init__(
        self,
        store: "ExpertStore",
        event: RoutingEvent,
        in_order: bool,
        whole: RoutingEvent | None = None,
        chosen: Mapping[int, Precision] | None = None,
    ) -> None:
        self._store = store
        self._layer = event.layer
        self._in_order = in_order
        self._held: set[int] = set()
        self._waiting: list[int] = []
        self._spared: set[int] = set()
        self._low = chosen is not None and all(chosen[e] is Precision.LOW for e in event.experts)
        with store._lock:
            hits = tuple(e for e in event.experts if ExpertKey(event.layer, e) in store._table)
            present = set(hits)
            if in_order:
                self._missing = list(event.experts)
                self._spared = present.copy()
            else:
                self._missing = [e for e in event.experts if e not in present]
                for expert in hits:
                    self._hold(expert)
            self._count(event, present)
            policy = store._pools[event.layer].policy
            policy.on_event(whole or event, hits)
            if chosen is not None:
                policy.on_precision(whole or event, chosen)
            self._request_missing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._held:
            return
        with self._store._lock:
            for expert in tuple(self._held):
                self._release(expert)
            self._store.told()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for batch in self.batches(1):
            yield from batch

    def batches(
        self, limit: int | None = None, freed: Callable[[], None] = lambda: None
    ) -> Iterator[list[tuple[int, Any]]]:
        """Yield lists of ``(expert, weights)`` that can be computed now; waits while there is none.

        Args:
            limit: experts of one list. While others still want a slot, a list takes at most half of the
                leased ones, so that reading goes on beside computing.
            freed: called when the slots of a list are free again and nothing has been waited for yet.
        """
        while self._waiting or self._missing:
            experts = self._take_ready(limit or len(self._waiting) + len(self._missing))
            bound = [(e, self._store._table[ExpertKey(self._layer, e)].weights) for e in experts]
            handed = time.perf_counter()
            yield bound
            self._store.stats.compute_seconds += time.perf_counter() - handed
            with self._store._lock:
                for expert in experts:
                    self._release(expert)
                if self._missing:
                    self._request_missing()
                self._store.told()
            freed()

    @property
    def all_requested(self) -> bool:
        """Whether every expert is leased, so that further slots may serve a prefetch."""
        return not self._missing

    def _take_ready(self, limit: int) -> list[int]:
        """Return held experts whose bytes are there, at least one; wait if there is none."""
        store, started = self._store, 0.0

        def found() -> list[int]:
            """Ask for what is missing; return what is there, and note when waiting began."""
            nonlocal started
            # First of all: slots freed before this thread began to wait wake nobody.
            self._request_missing()
            ready = self._ready(self._limited(limit))
            if not ready and store._closed:
                raise StoreError(
                    "the expert store was closed while a model was using it; load the model again"
                )
            started = started or (0.0 if ready else time.perf_counter())
            return ready

        ready = store.wait_for(found)
        if started:
            store.stats.stall_seconds += time.perf_counter() - started
        self._waiting = [expert for expert in self._waiting if expert not in ready]
        return ready

    def _limited(self, limit: int) -> int:
        return min(limit, max(1, len(self._waiting) // 2)) if self._missing else limit

    def _ready(self, limit: int) -> list[int]:
        """Return up to ``limit`` held experts that are read.

        In order, and while others want their slots, all of the first ones or none: whose slot comes free must
        not depend on who arrives first.
        """
        ready: list[int] = []
        whole = self._in_order or bool(self._missing)
        for expert in self._waiting[:limit] if whole else self._waiting:
            slot = self._store._table[ExpertKey(self._layer, expert)]
            if slot.state is SlotState.READY:
                if slot.error is not None:
                    raise slot.error
                ready.append(expert)
            elif whole:
                return []
            if len(ready) == limit:
                break
        return ready

    def _request_missing(self) -> None:
        """Give slots to as many misses as can have one now (the lock is held)."""
        store = self._store
        while self._missing:
            key = ExpertKey(self._layer, self._missing[0])
            if key not in store._table:  # another event may have brought it meanwhile
                # With nothing on its way this event could wait for ever, so it may then evict against the
                # policy.
                slot = store._take_slot(key, must=not self._waiting, spared=self._spared)
                if slot is None:
                    return
                store._start_read(key, slot, Priority.DEMAND)
            self._hold(self._missing.pop(0))

    def _hold(self, expert: int) -> None:
        key = ExpertKey(self._layer, expert)
        self._store._table[key].leases += 1
        self._held.add(expert)
        self._waiting.append(expert)
        self._spared.discard(expert)
        self._store.stats.useful_prefetch_bytes += self._store._ahead.pop(key, 0)
        ticket = self._store._tickets.get(key)
        if ticket is not None:
            self._store._hurry(ticket, self._store._table[key])

    def _release(self, expert: int) -> None:
        self._held.discard(expert)
        key = ExpertKey(self._layer, expert)
        slot = self._store._table.get(key)
        if slot is None:  # the store was closed
            return
        slot.leases -= 1
        if slot.error is not None and slot.leases == 0 and slot.state is SlotState.READY:
            self._store._drop(key, slot)

    def _count(self, event: RoutingEvent, present: set[int]) -> None:
        store, keys = self._store, [ExpertKey(event.layer, expert) for expert in present]
        late = sum(key in store._tickets for key in keys) if store._tickets else 0
        ahead = sum(key in store._ahead for key in keys) if store._ahead else 0
        store.stats.count_event(event, present, late, ahead, self._low)
