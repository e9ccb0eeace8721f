"""Stateful test of the store: leases, evictions, prefetches and concurrent events never mix up a byte."""

import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.policies.caches import LayerLRU, RandomEviction
from runtime.store_rig import FIELD_BYTES, expected_bytes, make_catalog, make_store

LAYERS, EXPERTS, TOP_K = 4, 6, 2
ids_strategy = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS)
layer_strategy = st.integers(0, LAYERS - 1)


def right(key, raws) -> bool:
    return all(np.array_equal(raw.numpy(), expected_bytes(key, f)) for f, raw in enumerate(raws))


class StoreMachine(RuleBasedStateMachine):
    """Events stay open across rules, so that leases of one event overlap other events."""

    @initialize(
        slots=st.integers(2, LAYERS * EXPERTS),
        random_policy=st.booleans(),
        mode=st.sampled_from(["auto", "cached"]),
        threads=st.integers(1, 4),
    )
    def open(self, slots, random_policy, mode, threads):
        self.folder = Path(tempfile.mkdtemp())
        catalog = make_catalog(self.folder, LAYERS, EXPERTS)
        policy = (
            RandomEviction(slots) if random_policy else LayerLRU(slots, [TOP_K] * LAYERS, [EXPERTS] * LAYERS)
        )
        self.slots = slots
        self.store = make_store(catalog, slots, TOP_K, mode=mode, threads=threads, policy=policy)
        self.open_event = None
        self.step = 0

    def event(self, layer, ids, phase="decode"):
        self.step += 1
        ids = tuple(sorted(ids))
        return RoutingEvent(self.step, layer, phase, len(ids), ids, (1,) * len(ids))

    def run_event(self, event):
        seen = []
        in_order = event.phase == "prefill"
        with self.store.lease(event, in_order=in_order) as lease:
            for expert, raws in lease:
                assert right(ExpertKey(event.layer, expert), raws)
                seen.append(expert)
        assert (seen if in_order else sorted(seen)) == list(event.experts)

    @rule(layer=layer_strategy, ids=ids_strategy, prefill=st.booleans())
    def whole_event(self, layer, ids, prefill):
        if self.open_event is None or self.slots > 2:
            self.run_event(self.event(layer, ids, "prefill" if prefill else "decode"))

    @rule(layer=layer_strategy, ids=ids_strategy)
    def start_event(self, layer, ids):
        """Hold one computed expert's lease across later rules and remember its bytes."""
        if self.open_event is not None or self.slots <= 2:
            return
        event = self.event(layer, sorted(ids)[:1])
        lease = self.store.lease(event)
        iterator = iter(lease)
        expert, raws = next(iterator)
        self.open_event = (lease, iterator, ExpertKey(layer, expert), raws)

    @rule()
    def finish_event(self):
        if self.open_event is None:
            return
        lease, iterator, key, raws = self.open_event
        assert right(key, raws), "a leased slot was overwritten"
        assert list(iterator) == []
        lease.__exit__(None, None, None)
        self.open_event = None

    @rule(layer=layer_strategy, expert=st.integers(0, EXPERTS - 1), postpone=st.booleans())
    def prefetch(self, layer, expert, postpone):
        key = ExpertKey(layer, expert)
        self.store.request(key, Priority.PREFETCH)
        if postpone:
            self.store.postpone(key)

    @rule(first=st.tuples(layer_strategy, ids_strategy), second=st.tuples(layer_strategy, ids_strategy))
    def concurrent_events(self, first, second):
        if self.open_event is not None:
            return
        errors = []

        def work(event):
            try:
                self.run_event(event)
            except BaseException as error:  # noqa: BLE001 - reported by the main thread
                errors.append(error)

        events = [self.event(*first, "prefill"), self.event(*second)]
        threads = [threading.Thread(target=work, args=(event,)) for event in events]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "two events wait for each other"
        assert not errors, errors

    @rule(layer=layer_strategy, ids=ids_strategy)
    def abandoned_event(self, layer, ids):
        """An exception in the middle of an event releases every lease."""
        with self.store.lease(self.event(layer, ids)):
            pass

    @invariant()
    def slots_are_accounted_for(self):
        if not hasattr(self, "store"):
            return
        store, pool = self.store, self.store._all_pools[0]
        with store._lock:
            used = [slot for slot in pool.slots if slot.key is not None]
            assert len(used) + len(pool.free) == self.slots
            assert {slot.key: slot for slot in used} == store._table
            assert len({slot.offset for slot in pool.slots}) == self.slots
            leased = sum(slot.leases for slot in used)
        assert leased == (0 if self.open_event is None else 1)

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.finish_event()
        self.store.wait_idle()
        for key, slot in self.store._table.items():
            assert right(key, slot.weights)
        stats = self.store.stats
        assert stats.total_bytes_read % sum(FIELD_BYTES) == 0
        self.store.close()
        shutil.rmtree(self.folder)


TestStore = StoreMachine.TestCase
# 220 runs of 50 steps: more than 10,000 steps.
TestStore.settings = settings(max_examples=220, stateful_step_count=50, deadline=None)
