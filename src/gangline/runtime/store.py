"""The expert store: the only component that touches expert bytes.

Tiers today are HOST (slots) and DISK (files of a catalog). An event's hits are decided and leased before any
of its misses evicts something (a later miss must not overwrite a slot that an earlier id already resolved
to); demand reads go before prefetches; a leased slot is never a victim. Which expert has a slot depends on
events and policies alone, never on how fast reads are: one that is still on its way may be a victim too, and
the next read into its slot begins when the first has ended.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gangline.core.errors import PackError, StoreError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.core.precision import Precision
from gangline.core.tiers import Priority, Tier
from gangline.policies.caches import CachePolicy
from gangline.runtime.files import ExpertFiles
from gangline.runtime.lease import EventLease
from gangline.runtime.read_plan import ReadPlan, plan_reads
from gangline.runtime.readers import Readers, Ticket
from gangline.runtime.slots import Slot, SlotPool, SlotState
from gangline.runtime.stats import StoreStats

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Bind = Callable[[int, "Sequence[Tensor]"], Any]

_T = TypeVar("_T")
_COUNTERS = {priority: priority.name.lower() for priority in Priority}


class ExpertStore:
    """Moves experts between DISK and HOST slots.

    Args:
        catalog: where every expert can be read.
        files: the catalog's files, open.
        pools: slot pools; ``pool_of_layer`` names the one of each layer.
        bind: makes the object that a kernel computes with from ``(layer, raw fields)``; None if it is not
            known yet (:meth:`bind_with`): experts may be read before, and stay on their way until then.
        io_threads: reads in flight.
        binders: threads that bind what has arrived; 0 leaves it to whoever looks for it next, which is best
            where ``bind`` takes no time.
    """

    def __init__(
        self,
        catalog: ExpertCatalog,
        files: ExpertFiles,
        pools: Sequence[SlotPool],
        pool_of_layer: Sequence[int],
        bind: Bind | None,
        io_threads: int,
        binders: int = 0,
    ) -> None:
        self._catalog = catalog
        self._files = files
        self._pools = [pools[index] for index in pool_of_layer]
        self._all_pools = list(pools)
        self._bind = bind
        self._forms: Sequence[Hashable] | None = None
        self._unbound: list[tuple[ExpertKey, Slot, Ticket]] = []
        self._table: dict[ExpertKey, Slot] = {}
        self._tickets: dict[ExpertKey, Ticket] = {}
        self._ahead: dict[ExpertKey, int] = {}  # read ahead and not used yet, with their bytes
        self._draining: set[Ticket] = set()  # reads that go on though their expert has lost its slot
        self._unverified = set(catalog.checksums or ())
        self._plans: dict[ExpertKey, ReadPlan] = {}
        self._lock = threading.Lock()
        self._waiters = 0
        self._arrived: deque[Ticket] = deque()
        self._readers = Readers(files, io_threads)
        self._closed = False
        self.stats = StoreStats()
        self._binders = [
            threading.Thread(target=self._keep_binding, name=f"gangline-binder-{i}", daemon=True)
            for i in range(binders)
        ]
        for thread in self._binders:
            thread.start()

    def residency(self) -> dict[ExpertKey, Tier]:
        """Return the fastest tier of every expert that is not only on DISK. Does not refresh recency."""
        self.absorb()
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

    def lease(
        self,
        event: RoutingEvent,
        *,
        in_order: bool = False,
        whole: RoutingEvent | None = None,
        chosen: Mapping[int, Precision] | None = None,
    ) -> EventLease:
        """Decide the hits of an event and start reading its misses; see :class:`EventLease`."""
        if self._closed:
            raise StoreError("the expert store is closed; load the model again")
        self.absorb()
        return EventLease(self, event, in_order, whole, chosen)

    def request(
        self,
        key: ExpertKey,
        priority: Priority = Priority.PREFETCH,
        *,
        spared: Collection[int] = (),
        kept: Collection[ExpertKey] = (),
    ) -> bool:
        """Start reading an expert that no event needs yet; False if it is there or no slot can be spared.

        ``spared``: experts of the same layer, and ``kept`` of any, that must not give up their slot for it.
        """
        self.absorb()
        with self._lock:
            if self._closed or key in self._table:
                return False
            slot = self._take_slot(key, spared=spared, kept=kept)
            if slot is None:
                return False
            self._start_read(key, slot, priority)
            return True

    def postpone(self, key: ExpertKey) -> None:
        """Read an expert that was asked for ahead of time after everything else: its layer did not want it.

        It keeps its slot until somebody needs that; a read that has not begun by then never will.
        """
        with self._lock:
            ticket, slot = self._tickets.get(key), self._table.get(key)
            if ticket is None or slot is None or slot.leases:
                return
            if slot.queued is ticket:
                ticket.priority = Priority.BACKGROUND
            else:
                self._readers.change(ticket, Priority.BACKGROUND)

    def forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Tell the cache policies what predictors expect."""
        with self._lock:
            for pool in self._all_pools:
                pool.policy.on_forecast(forecasts)

    def begin_request(self) -> None:
        """Tell the cache policies that a new sequence begins."""
        with self._lock:
            for pool in self._all_pools:
                pool.policy.on_request_start()

    def end_request(self) -> None:
        """Tell the cache policies that a sequence is complete."""
        with self._lock:
            for pool in self._all_pools:
                pool.policy.on_request_end()

    def use_policies(self, policies: Sequence[CachePolicy]) -> None:
        """Forget all experts and go on with other cache policies, one for each pool.

        Raises:
            StoreError: an event is being computed.
        """
        self.wait_idle()
        with self._lock:
            if any(slot.leases for slot in self._table.values()):
                raise StoreError("experts are in use; change the policy between two passes of the model")
            for key, slot in list(self._table.items()):
                self._drop(key, slot)
            for pool, policy in zip(self._all_pools, policies, strict=True):
                pool.policy = policy

    def resize(self, counts: Sequence[int], policies: Sequence[CachePolicy]) -> None:
        """Go on with so many slots in each pool, and with policies for them, before anything is read.

        Raises:
            StoreError: an expert has been asked for.
            BudgetError: the slots cannot be mapped.
        """
        with self._lock:
            if self._table or self._tickets or self._draining:
                raise StoreError("experts have slots already; their number stays")
            for pool, count, policy in zip(self._all_pools, counts, policies, strict=True):
                pool.policy = policy
                pool.resize(count)

    def bind_with(self, bind: Bind, forms: Sequence[Hashable] | None = None) -> None:
        """Say what makes the objects that kernels compute with, of a store that was opened without.

        Args:
            bind: see above.
            forms: for every layer what its objects depend on beside the bytes they look at, or None for a
                layer whose objects serve one expert only. An object is used again for the next expert in its
                slot if that has the same form and its fields the same places.
        """
        with self._lock:
            self._bind, self._forms = bind, forms
            unbound, self._unbound = self._unbound, []
        for key, slot, ticket in unbound:
            self._finish(key, slot, ticket)

    def read_with(self, more: int) -> None:
        """Read with so many threads more."""
        self._readers.add(more)

    def follow(self, policies: Sequence[CachePolicy]) -> None:
        """Go on with other cache policies, one for each pool, that are told which experts have slots."""
        with self._lock:
            for pool, policy in zip(self._all_pools, policies, strict=True):
                pool.policy = policy
            for key in self._table:
                self._pools[key.layer].policy.admitted(key)

    def take_pages(self) -> Iterator[int]:
        """Take the physical pages of all slots; see :meth:`SlotPool.take_pages`."""
        for pool in self._all_pools:
            yield from pool.take_pages()

    @property
    def under_way(self) -> int:
        """Number of experts that are requested and not there yet."""
        return len(self._tickets)

    def wait_below(self, reads: int) -> None:
        """Wait until fewer than ``reads`` experts are on their way."""
        self.wait_for(lambda: len(self._tickets) < reads)

    def wait_idle(self) -> None:
        """Wait until nothing is being read; raise the first read error, if any."""
        self.wait_for(lambda: not self._tickets and not self._draining)
        with self._lock:
            for slot in self._table.values():
                if slot.error is not None:
                    raise slot.error

    def wait_for(self, found: Callable[[], _T]) -> _T:
        """Wait until ``found()`` is true, and return it; it is called with the lock held after changes."""
        while True:
            seen = self._readers.changes()
            self.absorb()
            with self._lock:
                result = found()
                if result:
                    return result
                self._waiters += 1
            try:
                self._readers.wait(seen)
            finally:
                with self._lock:
                    self._waiters -= 1

    def told(self) -> None:
        """Wake those who wait: something has changed (the lock is held)."""
        if self._waiters:
            self._readers.poke()

    def absorb(self) -> None:
        """Bind what has arrived, unless threads of its own do that."""
        if not self._binders:
            for ticket in self._readers.finished():
                ticket.on_done(ticket)

    def _keep_binding(self) -> None:
        """Bind what arrives, one expert at a time, until the store is closed."""
        while not self._closed:
            seen = self._readers.changes()
            with self._lock:
                self._arrived.extend(self._readers.finished())
                ticket = self._arrived.popleft() if self._arrived else None
            if ticket is None:
                self._readers.wait(seen)
            else:
                ticket.on_done(ticket)

    def close(self) -> None:
        """Stop reading and forget all experts."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._readers.close()
        for thread in self._binders:
            thread.join()
        self._files.close()
        with self._lock:
            self._table.clear()
            self._tickets.clear()
            self._draining.clear()
            self._unbound.clear()
            self._arrived.clear()
        self._readers.poke()

    # Slots: the lock is held in all of these.

    def _take_slot(
        self,
        key: ExpertKey,
        *,
        must: bool = False,
        spared: Collection[int] = (),
        kept: Collection[ExpertKey] = (),
    ) -> Slot | None:
        """Return a free slot or the victim's. ``must``: any evictable one where the policy would wait.

        ``spared``: experts of the same layer that their event still needs; a victim only if ``must``.
        ``kept``: experts of any layer.
        """
        pool = self._pools[key.layer]
        if pool.free:
            return pool.free.pop()

        def evictable(k: ExpertKey) -> bool:
            return self._evictable(k) and not (k.layer == key.layer and k.expert in spared) and k not in kept

        victim = pool.policy.victim(key.layer, evictable)
        if victim is None and must:
            residents = (k for k in self._table if self._pools[k.layer] is pool and self._evictable(k))
            victim = next(residents, None)
        if victim is None:
            return None
        self._drop(victim, self._table[victim])
        self.stats.evictions += 1
        return pool.free.pop()

    def _evictable(self, key: ExpertKey) -> bool:
        return self._table[key].leases == 0

    def _drop(self, key: ExpertKey, slot: Slot) -> None:
        pool = self._pools[key.layer]
        del self._table[key]
        pool.policy.evicted(key)
        ticket = self._tickets.pop(key, None)
        if ticket is not None:
            self._stop(key, slot, ticket)
        self.stats.wasted_prefetch_bytes += self._ahead.pop(key, 0)
        slot.state, slot.key, slot.weights, slot.error = SlotState.FREE, None, None, None
        pool.free.append(slot)

    def _stop(self, key: ExpertKey, slot: Slot, ticket: Ticket) -> None:
        """End a read, at once if it has not begun; otherwise its slot must wait for its end."""
        if slot.queued is ticket:
            slot.queued = None
        elif not self._readers.cancel(ticket):
            slot.draining = ticket
            self._draining.add(ticket)
            return
        self.stats.bytes_read[_COUNTERS[ticket.asked]] -= ticket.plan.payload
        self._ahead.pop(key, None)

    def _hurry(self, ticket: Ticket, slot: Slot) -> None:
        """Somebody waits for this read."""
        if slot.queued is ticket:
            ticket.priority = Priority.DEMAND
            ticket = slot.draining or ticket
        self._readers.change(ticket, Priority.DEMAND)

    def _start_read(self, key: ExpertKey, slot: Slot, priority: Priority) -> None:
        pool = self._pools[key.layer]
        plan = self._plan(key)
        slot.state, slot.key = SlotState.LOADING, key
        self._table[key] = slot
        pool.policy.admitted(key)
        view = pool.view[slot.offset : slot.offset + pool.slot_bytes]
        address = pool.address + slot.offset
        crc = self._catalog.checksums[key] if self._catalog.checksums and key in self._unverified else None
        ticket = Ticket(plan, view, address, priority, lambda done: self._finish(key, slot, done), crc)
        self._tickets[key] = ticket
        self.stats.bytes_read[_COUNTERS[priority]] += plan.payload
        if priority is Priority.PREFETCH:
            self._ahead[key] = plan.payload
        if slot.draining is None:
            self._readers.submit(ticket)
            return
        slot.queued = ticket
        if priority is Priority.DEMAND:
            self._hurry(ticket, slot)

    def _plan(self, key: ExpertKey) -> ReadPlan:
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_reads(self._catalog.extents[key], self._files.align)
        return plan

    # Completion: runs in the thread that looks for what has arrived.

    def _finish(self, key: ExpertKey, slot: Slot, ticket: Ticket) -> None:
        with self._lock:
            if ticket in self._draining:
                self._drained(slot, ticket)
                return
            bind = self._bind
            if bind is None:
                self._unbound.append((key, slot, ticket))
                return
        error: Exception | None = ticket.error or self._damage(key, ticket)
        weights = None
        if error is None:
            try:
                weights = self._bound(bind, key.layer, slot, ticket.plan)
            except Exception as raised:  # noqa: BLE001 - the thread that waits for this expert must see it
                error = raised
        with self._lock:
            if ticket in self._draining:
                self._drained(slot, ticket)
            if self._tickets.get(key) is not ticket:
                return
            del self._tickets[key]
            slot.weights, slot.error, slot.state = weights, error, SlotState.READY
            self.told()

    def _bound(self, bind: Bind, layer: int, slot: Slot, plan: ReadPlan) -> Any:
        """Return what the kernel computes a slot's expert with, made anew only where it must be."""
        form = None if self._forms is None else self._forms[layer]
        if form is not None and slot.bound is not None and slot.bound[:2] == (form, plan.fields):
            return slot.bound[2]
        weights = bind(layer, self._pools[layer].raw(slot, plan.fields))
        slot.bound = None if form is None else (form, plan.fields, weights)
        return weights

    def _drained(self, slot: Slot, ticket: Ticket) -> None:
        """A read that nobody wants any more has ended: the next one may begin."""
        self._draining.discard(ticket)
        queued, slot.draining, slot.queued = slot.queued, None, None
        if queued is not None:
            self._readers.submit(queued)
        self.told()

    def _damage(self, key: ExpertKey, ticket: Ticket) -> PackError | None:
        """Say what is wrong with an expert whose checksum was compared: the first time it is read here."""
        if ticket.corrupt:
            path = self._catalog.files[self._catalog.extents[key][0].file]
            return PackError(
                f"layer {key.layer} expert {key.expert}: checksum differs in {path}; "
                "remove it with 'gangline cache rm' and load the model again"
            )
        self._unverified.discard(key)
        return None
