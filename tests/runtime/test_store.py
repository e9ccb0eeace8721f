"""The store: order, accounting, errors."""

import os
import threading

import pytest

from gangline.core.errors import CheckpointError, PackError, StoreError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority, Tier
from gangline.policies.caches import LayerLRU
from gangline.runtime import readers
from runtime.store_rig import FIELD_BYTES, make_catalog, make_store


@pytest.fixture
def python_reads(monkeypatch):
    """Reads that a test can hold up: the native core's go past Python."""
    monkeypatch.setattr(readers, "native", lambda: None)


def event(step, layer, ids, phase="decode"):
    return RoutingEvent(step, layer, phase, 1, tuple(ids), (1,) * len(ids))


def run(store, *args, **kwargs):
    with store.lease(event(*args, **kwargs)) as lease:
        return [expert for expert, _ in lease]


def test_hits_come_first_and_are_counted(tmp_path):
    store = make_store(make_catalog(tmp_path, 2, 6), slots=8, top_k=2)
    assert sorted(run(store, 1, 0, [1, 4])) == [1, 4]
    assert run(store, 2, 0, [0, 4])[0] == 4
    assert (store.stats.hits, store.stats.misses) == (1, 3)
    assert store.stats.total_bytes_read == 3 * sum(FIELD_BYTES)
    assert store.stats.hit_rate == pytest.approx(0.25)
    assert store.residency()[ExpertKey(0, 4)] is Tier.HOST
    store.close()


def test_slots_are_counted_anew_only_before_the_first_read(tmp_path):
    store = make_store(make_catalog(tmp_path, 1, 6), slots=2, top_k=1)
    policy = LayerLRU(5, [1], [6])
    store.resize([5], [policy])
    for step in range(6):
        run(store, step, 0, [step])
    assert len(store.residency()) == 5 and store.stats.evictions == 1
    assert ExpertKey(0, 0) not in store.residency()
    with pytest.raises(StoreError, match="their number stays"):
        store.resize([6], [policy])
    store.close()


def test_residency_does_not_refresh_recency(tmp_path):
    store = make_store(make_catalog(tmp_path, 1, 6), slots=4, top_k=1)
    for step, expert in enumerate([0, 1, 2, 3]):
        run(store, step, 0, [expert])
    for _ in range(3):
        store.residency()
    run(store, 9, 0, [5])
    assert ExpertKey(0, 0) not in store.residency()
    store.close()


def test_capacity_for_everything_reads_each_expert_once(tmp_path):
    layers, experts = 3, 5
    store = make_store(make_catalog(tmp_path, layers, experts), slots=layers * experts, top_k=2)
    for step in range(10):
        for layer in range(layers):
            run(store, step, layer, [step % experts, (step + 2) % experts])
    assert store.stats.total_bytes_read == layers * experts * sum(FIELD_BYTES)
    assert store.stats.evictions == 0
    store.close()


def test_demand_overtakes_prefetch(tmp_path, python_reads):
    """A demand read is served before prefetches that were queued earlier."""
    catalog = make_catalog(tmp_path, 1, 6)
    store = make_store(catalog, slots=6, top_k=2, threads=1)
    order, gate, started = [], threading.Event(), threading.Event()
    read = store._files.read

    def slow_read(file, offset, view, wanted):
        started.set()
        gate.wait(10)
        order.append(offset)
        read(file, offset, view, wanted)

    store._files.read = slow_read
    for expert in range(4):
        store.request(ExpertKey(0, expert), Priority.PREFETCH)
    assert started.wait(10)
    lease = store.lease(event(1, 0, [5]))
    gate.set()
    assert [expert for expert, _ in lease] == [5]
    store.wait_idle()
    demand = {c.offset for c in store._plan(ExpertKey(0, 5)).chunks}
    behind = order[1:]  # the single thread already holds one chunk of the first prefetch
    assert set(behind[: len(demand)]) == demand
    store.close()


def test_wrong_checksum_names_layer_and_expert(tmp_path):
    catalog = make_catalog(tmp_path, 2, 3)
    extent = catalog.extents[ExpertKey(1, 2)][1]
    with catalog.files[0].open("r+b") as file:
        file.seek(extent.offset + 17)
        byte = file.read(1)
        file.seek(extent.offset + 17)
        file.write(bytes([byte[0] ^ 1]))
    store = make_store(catalog, slots=6, top_k=2)
    with pytest.raises(PackError, match="layer 1 expert 2"):
        run(store, 1, 1, [2])
    assert sorted(run(store, 2, 1, [0, 1])) == [0, 1], "other experts still work"
    assert ExpertKey(1, 2) not in store.residency()
    store.close()


def test_truncated_file_is_named(tmp_path):
    catalog = make_catalog(tmp_path, 1, 4)
    os.truncate(catalog.files[0], catalog.extents[ExpertKey(0, 3)][1].offset + 10)
    store = make_store(catalog, slots=4, top_k=2)
    with pytest.raises(CheckpointError, match="bytes short"):
        run(store, 1, 0, [3])
    assert run(store, 2, 0, [0]) == [0]
    store.close()


def test_closed_store_refuses(tmp_path):
    store = make_store(make_catalog(tmp_path, 1, 4), slots=4, top_k=2)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.lease(event(1, 0, [0]))


def held_reads(store):
    """Let no read of the store go on before the returned gate is open."""
    gate, read = threading.Event(), store._files.read

    def slow_read(*args):
        gate.wait(20)
        read(*args)

    store._files.read = slow_read
    return gate


def test_what_is_on_its_way_may_be_a_victim(tmp_path, python_reads):
    """Residency follows the policy alone: a read that began goes on, one that did not never happens."""
    catalog = make_catalog(tmp_path, 1, 6)
    store = make_store(catalog, slots=2, top_k=1, threads=1)
    gate = held_reads(store)
    size = sum(extent.nbytes for extent in catalog.extents[ExpertKey(0, 0)])
    for expert in range(6):
        assert store.request(ExpertKey(0, expert))
    held = [expert for expert in range(6) if store.holds(ExpertKey(0, expert))]
    assert len(held) == 2 and 5 in held and store.stats.evictions == 4
    gate.set()
    store.wait_idle()
    assert set(store.residency()) == {ExpertKey(0, expert) for expert in held}
    assert store.stats.bytes_read["prefetch"] <= 4 * size  # two that were stopped late, two that are there
    with store.lease(event(1, 0, held)) as lease:
        assert sorted(expert for expert, _ in lease) == held
    store.close()


def test_an_event_gets_the_slot_of_a_read_that_cannot_be_stopped(tmp_path, python_reads):
    store = make_store(make_catalog(tmp_path, 1, 6), slots=1, top_k=1, threads=1)
    gate, began, read = threading.Event(), threading.Event(), store._files.read

    def slow_read(*args):
        began.set()
        gate.wait(20)
        read(*args)

    store._files.read = slow_read
    store.request(ExpertKey(0, 3))
    assert began.wait(20)
    with store.lease(event(1, 0, [4])) as lease:
        assert store.holds(ExpertKey(0, 4)) and not store.holds(ExpertKey(0, 3))
        gate.set()
        assert [expert for expert, _ in lease] == [4]
    store.wait_idle()
    assert set(store.residency()) == {ExpertKey(0, 4)}
    store.close()


def test_postponed_reads_come_last(tmp_path, python_reads):
    store = make_store(make_catalog(tmp_path, 1, 6), slots=6, top_k=2, threads=1)
    gate, order, read = threading.Event(), [], store._files.read
    began = threading.Event()

    def slow_read(*args):
        began.set()
        gate.wait(20)
        order.append(args[1])
        read(*args)

    store._files.read = slow_read
    store.request(ExpertKey(0, 0))
    assert began.wait(20)
    for expert in (1, 2, 3):
        store.request(ExpertKey(0, expert))
    store.postpone(ExpertKey(0, 1))
    store.postpone(ExpertKey(0, 5))  # nobody asked for it
    gate.set()
    store.wait_idle()
    assert set(store.residency()) == {ExpertKey(0, expert) for expert in range(4)}
    places = [store._plan(ExpertKey(0, expert)).chunks[0].offset for expert in (0, 2, 3, 1)]
    assert [offset for offset in order if offset in places] == places
    store.close()


def test_slots_freed_before_waiting_are_not_missed(tmp_path):
    """Two leases fill the pool, a third opens without a slot, and only then are the first two released."""
    store = make_store(make_catalog(tmp_path, 1, 6), slots=2, top_k=1)
    first, second = store.lease(event(1, 0, [0])), store.lease(event(2, 0, [1]))
    third = store.lease(event(3, 0, [2]))
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    found = []
    thread = threading.Thread(target=lambda: found.extend(expert for expert, _ in third), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert found == [2]
    store.close()
