"""The expert store: the only component that touches expert bytes.

Tiers today are HOST (slots) and DISK (files of a catalog). An event's hits are decided and leased before any
of its misses evicts something (a later miss must not overwrite a slot that an earlier id already resolved
to); demand reads go before prefetches; a leased or loading slot is never a victim.
"""

import logging
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from gangline.core.errors import PackError, StoreError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.core.tiers import Priority, Tier
from gangline.runtime.files import ExpertFiles
from gangline.runtime.read_plan import ReadPlan, plan_reads
from gangline.runtime.readers import Readers, Ticket
from gangline.runtime.slots import Slot, SlotPool, SlotState
from gangline.runtime.stats import StoreStats

logger = logging.getLogger(__name__)

Bind = Callable[[int, Sequence[Tensor]], Any]


class ExpertStore:
    """Moves experts between DISK and HOST slots.

    Args:
        catalog: where every expert can be read.
        files: the catalog's files, open.
        pools: slot pools; ``pool_of_layer`` names the one of each layer.
        bind: makes the object that a kernel computes with from ``(layer, raw fields)``.
        io_threads: reads in flight.
    """

    def __init__(
        self,
        catalog: ExpertCatalog,
        files: ExpertFiles,
        pools: Sequence[SlotPool],
        pool_of_layer: Sequence[int],
        bind: Bind,
        io_threads: int,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._pools = [pools[index] for index in pool_of_layer]
        self._all_pools = list(pools)
        self._bind = bind
        self._table: dict[ExpertKey, Slot] = {}
        self._tickets: dict[ExpertKey, Ticket] = {}
        self._unverified = set(catalog.checksums or ())
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._readers = Readers(files, io_threads)
        self._closed = False
        self.stats = StoreStats()

    def residency(self) -> dict[ExpertKey, Tier]:
        """Return the fastest tier of every expert that is not only on DISK. Does not refresh recency."""
        with self._lock:
            return {key: Tier.HOST for key, slot in self._table.items() if slot.state is SlotState.READY}

    def holds(self, key: ExpertKey) -> bool:
        """Whether an expert has a slot, read or on its way."""
        return key in self._table

    def bound(self, key: ExpertKey) -> Any:
        """Return what the kernel computes an expert with; it must be there and stay (nothing is leased)."""
        return self._table[key].weights

    def count_resident(self, experts: int, uses: int) -> None:
        """Count experts, and tokens that used them, served without a lease: they are in memory for good."""
        self.stats.hits += experts
        self.stats.hit_tokens += uses

    def lease(self, event: RoutingEvent, *, in_order: bool = False) -> "EventLease":
        """Decide the hits of an event and start reading its misses; see :class:`EventLease`."""
        if self._closed:
            raise StoreError("the expert store is closed; load the model again")
        return EventLease(self, event, in_order)

    def request(
        self, key: ExpertKey, priority: Priority = Priority.PREFETCH, *, spared: Collection[int] = ()
    ) -> bool:
        """Start reading an expert that no event needs yet; False if it is there or no slot can be spared.

        ``spared``: experts of the same layer that must not give up their slot for it.
        """
        with self._lock:
            if self._closed or key in self._table:
                return False
            slot = self._take_slot(key, spared=spared)
            if slot is None:
                return False
            self._start_read(key, slot, priority)
            return True

    def cancel(self, key: ExpertKey) -> bool:
        """Drop a requested read that has not started and that no event waits for."""
        with self._changed:
            ticket, slot = self._tickets.get(key), self._table.get(key)
            if ticket is None or slot is None or slot.leases or not self._readers.cancel(ticket):
                return False
            del self._tickets[key]
            self._drop(key, slot)
            self._changed.notify_all()
            return True

    def wait_below(self, reads: int) -> None:
        """Wait until fewer than ``reads`` experts are on their way."""
        with self._changed:
            while len(self._tickets) >= reads:
                self._changed.wait()

    def wait_idle(self) -> None:
        """Wait until nothing is being read; raise the first read error, if any."""
        with self._changed:
            while self._tickets:
                self._changed.wait()
            for slot in self._table.values():
                if slot.error is not None:
                    raise slot.error

    def close(self) -> None:
        """Stop reading and forget all experts."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._readers.close()
        self._files.close()
        with self._changed:
            self._table.clear()
            self._tickets.clear()
            self._changed.notify_all()

    # Slots: the lock is held in all of these.

    def _take_slot(self, key: ExpertKey, *, must: bool = False, spared: Collection[int] = ()) -> Slot | None:
        """Return a free slot or the victim's. ``must``: any evictable one where the policy would wait.

        ``spared``: experts of the same layer that their event still needs; a victim only if ``must``.
        """
        pool = self._pools[key.layer]
        if pool.free:
            return pool.free.pop()
        victim = pool.policy.victim(
            key.layer, lambda k: self._evictable(k) and not (k.layer == key.layer and k.expert in spared)
        )
        if victim is None and must:
            residents = (k for k in self._table if self._pools[k.layer] is pool and self._evictable(k))
            victim = next(residents, None)
        if victim is None:
            return None
        self._drop(victim, self._table[victim])
        self.stats.evictions += 1
        return pool.free.pop()

    def _evictable(self, key: ExpertKey) -> bool:
        slot = self._table[key]
        return slot.leases == 0 and slot.state is SlotState.READY

    def _drop(self, key: ExpertKey, slot: Slot) -> None:
        pool = self._pools[key.layer]
        del self._table[key]
        pool.policy.evicted(key)
        slot.state, slot.key, slot.weights, slot.error = SlotState.FREE, None, None, None
        pool.free.append(slot)

    def _start_read(self, key: ExpertKey, slot: Slot, priority: Priority) -> None:
        pool = self._pools[key.layer]
        plan = self._plan(key)
        slot.state, slot.key = SlotState.LOADING, key
        self._table[key] = slot
        pool.policy.admitted(key)
        view = pool.view[slot.offset : slot.offset + pool.slot_bytes]
        ticket = Ticket(plan, view, priority, lambda done: self._finish(key, slot, done))
        self._tickets[key] = ticket
        self.stats.bytes_read[priority.name.lower()] += sum(nbytes for _, nbytes in plan.fields)
        self._readers.submit(ticket)

    def _plan(self, key: ExpertKey) -> ReadPlan:
        return plan_reads(self._catalog.extents[key], self._files.align)

    # Completion: runs in a reader thread.

    def _finish(self, key: ExpertKey, slot: Slot, ticket: Ticket) -> None:
        raws = self._pools[key.layer].raw(slot, ticket.plan.fields)
        error: Exception | None = ticket.error or self._verify(key, raws)
        weights = None
        if error is None:
            try:
                weights = self._bind(key.layer, raws)
            except Exception as raised:  # noqa: BLE001 - the thread that waits for this expert must see it
                error = raised
        with self._changed:
            if self._tickets.get(key) is not ticket:
                return
            del self._tickets[key]
            slot.weights, slot.error, slot.state = weights, error, SlotState.READY
            self._changed.notify_all()

    def _verify(self, key: ExpertKey, raws: Sequence[Tensor]) -> PackError | None:
        """Check an expert against its checksum the first time it is read in this process."""
        if key not in self._unverified:
            return None
        crc = 0
        for raw in raws:
            crc = zlib.crc32(raw.numpy().data, crc)
        assert self._catalog.checksums is not None
        if crc != self._catalog.checksums[key]:
            path = self._catalog.files[self._catalog.extents[key][0].file]
            return PackError(
                f"layer {key.layer} expert {key.expert}: checksum differs in {path}; "
                "remove it with 'gangline cache rm' and load the model again"
            )
        self._unverified.discard(key)
        return None


class EventLease:
    """The experts of one routing event, leased until each has been computed.

    Iterate to get ``(expert, weights)``. By default hits come first and misses as they arrive; all hits are
    leased at once. ``in_order`` gives experts in ascending id, for sums that run as they come: leases then
    run ahead as far as there are slots, and hits that are not leased yet are not evicted for this event. An
    expert's lease ends when the next one is asked for, so a prompt streams through few slots. Use as a
    context manager: leaving it, also by an exception, releases everything.
    """

    def __init__(self, store: ExpertStore, event: RoutingEvent, in_order: bool) -> None:
        self._store = store
        self._layer = event.layer
        self._in_order = in_order
        self._held: set[int] = set()
        self._waiting: list[int] = []
        self._spared: set[int] = set()
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
            store._pools[event.layer].policy.on_event(event, hits)
            self._request_missing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._store._changed:
            for expert in tuple(self._held):
                self._release(expert)
            self._store._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for batch in self.batches(1):
            yield from batch

    def batches(self, limit: int | None = None) -> Iterator[list[tuple[int, Any]]]:
        """Yield lists of ``(expert, weights)`` that can be computed now; waits while there is none.

        ``limit``: experts of one list. While others still want a slot, a list takes at most half of the
        leased ones, so that reading goes on beside computing.
        """
        while self._waiting or self._missing:
            experts = self._take_ready(limit or len(self._waiting) + len(self._missing))
            yield [(e, self._store._table[ExpertKey(self._layer, e)].weights) for e in experts]
            with self._store._changed:
                for expert in experts:
                    self._release(expert)
                if self._missing:
                    self._request_missing()
                self._store._changed.notify_all()

    @property
    def all_requested(self) -> bool:
        """Whether every expert is leased, so that further slots may serve a prefetch."""
        return not self._missing

    def _take_ready(self, limit: int) -> list[int]:
        """Return held experts whose bytes are there, at least one; wait if there is none."""
        store = self._store
        with store._changed:
            started = 0.0
            while True:
                # First of all: slots freed before this thread began to wait wake nobody.
                self._request_missing()
                if self._missing:
                    limit = min(limit, max(1, len(self._waiting) // 2))
                ready = self._ready(limit)
                if ready:
                    self._waiting = [expert for expert in self._waiting if expert not in ready]
                    if started:
                        store.stats.stall_seconds += time.perf_counter() - started
                    return ready
                if store._closed:
                    raise StoreError(
                        "the expert store was closed while a model was using it; load the model again"
                    )
                started = started or time.perf_counter()
                store._changed.wait()

    def _ready(self, limit: int) -> list[int]:
        """Return up to ``limit`` held experts that are read; in order, none behind one that is not."""
        ready: list[int] = []
        for expert in self._waiting:
            slot = self._store._table[ExpertKey(self._layer, expert)]
            if slot.state is SlotState.READY:
                if slot.error is not None:
                    raise slot.error
                ready.append(expert)
            elif self._in_order:
                break
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
        ticket = self._store._tickets.get(key)
        if ticket is not None:
            self._store._readers.promote(ticket, Priority.DEMAND)

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
        stats = self._store.stats
        stats.hits += len(present)
        stats.misses += len(event.experts) - len(present)
        stats.late += sum(ExpertKey(event.layer, expert) in self._store._tickets for expert in present)
        for expert, count in zip(event.experts, event.counts, strict=True):
            if expert in present:
                stats.hit_tokens += count
            else:
                stats.miss_tokens += count
