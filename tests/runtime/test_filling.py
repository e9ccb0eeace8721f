"""Reading before the kernels are known, and taking from the page cache what happens to lie there."""

import mmap
import os
import random
from types import SimpleNamespace

import pytest
import torch

import gangline
from gangline.core.errors import CheckpointError, PackError
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.runtime import files as files_module
from gangline.runtime import filling, load
from gangline.runtime.files import ALIGN, ExpertFiles
from gangline.runtime.filling import request_all, wait_for_all
from gangline.runtime.opened import OpenedModel
from runtime.store_rig import FIELD_BYTES, expected_bytes, make_catalog, make_store
from tiny_models import tiny_model


def unbound_store(catalog):
    return make_store(catalog, slots=len(catalog.extents), top_k=1, bound=False)


def right(key, raws):
    return all(
        raw.numpy().tobytes() == expected_bytes(key, field).tobytes() for field, raw in enumerate(raws)
    )


def test_experts_are_read_before_their_kernels_are_known(tmp_path):
    catalog = make_catalog(tmp_path, 2, 5)
    store = unbound_store(catalog)
    request_all(store, catalog)
    assert store.under_way == 10
    store.bind_with(lambda layer, raws: (layer, raws))
    wait_for_all(store, catalog, False)
    assert store.under_way == 0
    for key in catalog.extents:
        layer, raws = store.bound(key)
        assert layer == key.layer
        assert right(key, raws)
    assert store.stats.total_bytes_read == 10 * sum(FIELD_BYTES)
    store.close()


def test_kernels_may_come_while_experts_do(tmp_path, seed):
    catalog = make_catalog(tmp_path, 3, 4)
    keys = list(catalog.extents)
    at = random.Random(seed).randrange(len(keys) + 1)
    store = unbound_store(catalog)
    for number, key in enumerate(keys):
        if number == at:
            store.bind_with(lambda layer, raws: raws)
        store.request(key, Priority.BACKGROUND)
    if at == len(keys):
        store.bind_with(lambda layer, raws: raws)
    wait_for_all(store, catalog, False)
    assert all(right(key, store.bound(key)) for key in keys)
    store.close()


def test_a_read_error_is_raised_once_the_kernels_are_known(tmp_path, seed):
    catalog = make_catalog(tmp_path, 1, 4)
    damaged = ExpertKey(0, seed % 4)
    extent = catalog.extents[damaged][0]
    with catalog.files[0].open("r+b") as file:
        file.seek(extent.offset)
        old = file.read(1)
        file.seek(extent.offset)
        file.write(bytes([old[0] ^ 1]))
    store = unbound_store(catalog)
    request_all(store, catalog)
    store.bind_with(lambda layer, raws: raws)
    with pytest.raises(PackError, match=f"layer 0 expert {damaged.expert}"):
        wait_for_all(store, catalog, False)
    store.close()


def test_closing_forgets_what_waits_for_its_kernel(tmp_path):
    catalog = make_catalog(tmp_path, 1, 3)
    store = unbound_store(catalog)
    request_all(store, catalog)
    store.close()
    store.bind_with(lambda layer, raws: pytest.fail("nothing is left to bind"))
    assert store.under_way == 0


@pytest.fixture
def written(tmp_path, seed):
    data = random.Random(seed).randbytes(50 * ALIGN + seed % ALIGN)
    (tmp_path / "file").write_bytes(data)
    return tmp_path / "file", data


def read(files, offset, wanted):
    length = -(-wanted // ALIGN) * ALIGN
    with mmap.mmap(-1, length) as memory:
        with memoryview(memory) as view:
            files.read(0, offset, view, wanted)
        return memory[:wanted]


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_the_page_cache_may_hold_any_part(written, seed, monkeypatch, share):
    """``share``: of each read that the page cache gives; None leaves it to the system."""
    path, data = written
    chance = random.Random(seed)
    real = os.preadv

    def preadv(descriptor, buffers, offset, flags=0):
        if not flags or share is None:
            return real(descriptor, buffers, offset, flags)
        held = int(chance.random() * 2 * share * len(buffers[0]))
        if held == 0:
            raise BlockingIOError
        return real(descriptor, [buffers[0][:held]], offset)

    monkeypatch.setattr(files_module.os, "preadv", preadv)
    files = ExpertFiles([path], "auto", warm=True)
    for _ in range(30):
        offset = chance.randrange(50) * ALIGN
        wanted = chance.randrange(1, len(data) - offset + 1)
        assert read(files, offset, wanted) == data[offset : offset + wanted]
    with pytest.raises(CheckpointError, match="bytes short"):
        read(files, 49 * ALIGN, 3 * ALIGN)
    files.close()


@pytest.mark.parametrize(("mode", "warm"), [("direct", True), ("cached", True), ("auto", False)])
def test_the_page_cache_is_asked_only_where_it_may_be(written, monkeypatch, mode, warm):
    path, data = written
    try:
        files = ExpertFiles([path], mode, warm=warm)
    except gangline.GanglineError:
        pytest.skip("this file system has no direct reads")
    real = os.preadv

    def preadv(descriptor, buffers, offset, flags=0):
        assert flags == 0
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(files_module.os, "preadv", preadv)
    assert read(files, 0, len(data)) == data
    files.close()


@pytest.fixture
def saved(tmp_path, seed, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    model = tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_reading_begins_late_where_loading_needs_the_memory(saved, monkeypatch, seed):
    begun = []
    real = load.begin_filling

    def begin(plan, *others):
        needed = plan.slot_bytes + plan.dense + plan.load_extra
        for short in (1, 0):
            memory = SimpleNamespace(available=needed - short)
            with monkeypatch.context() as patch:
                patch.setattr(filling.psutil, "virtual_memory", lambda memory=memory: memory)
                begun.append(real(plan, *others))
        return begun[-1]

    monkeypatch.setattr(load, "begin_filling", begin)
    with gangline.load(saved).gangline as runtime:
        assert begun == [None, runtime.store]


@pytest.mark.parametrize("memory", [None, "4GiB"])
def test_reading_begins_early_only_without_a_budget(saved, monkeypatch, memory):
    begun = []
    real = load.begin_filling
    monkeypatch.setattr(load, "begin_filling", lambda *a: begun.append(real(*a)) or begun[0])
    with gangline.load(saved, memory=memory).gangline as runtime:
        assert runtime.plan.everything_resident
        assert (begun == [runtime.store]) is (memory is None)
        assert len(runtime.store.residency()) == sum(x.experts for x in runtime.view.geometry.layers)


def test_a_load_that_fails_leaves_no_store_open(saved, monkeypatch):
    begun = []
    real = load.begin_filling
    monkeypatch.setattr(load, "begin_filling", lambda *a: begun.append(real(*a)) or begun[0])

    def fails(self, codec):
        raise CheckpointError("the dense weights are gone; restore them")

    monkeypatch.setattr(OpenedModel, "load_dense", fails)
    with pytest.raises(CheckpointError, match="gone"):
        gangline.load(saved)
    assert begun[0]._closed


def test_meanwhile_is_called_once(saved):
    calls = []
    gangline.load(saved, meanwhile=lambda: calls.append(1)).gangline.close()
    assert calls == [1]
