"""Reading begins before the libraries are imported, and only with what the checkpoint then asks for."""

import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import gangline
from gangline.core.home import cache_dir
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.policies.caches.fifo import FIFO
from gangline.runtime import head_start as module
from gangline.runtime import options, slots
from gangline.runtime.filling import wait_for_all
from gangline.runtime.head_start import HeadStart
from gangline.runtime.read_plan import read_sizes
from gangline.runtime.store import ExpertStore
from gangline.runtime.store_opening import Contents, open_contents
from runtime.store_rig import expected_bytes, make_catalog
from tiny_models import tiny_model

LAYERS, EXPERTS = 3, 4


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))


@pytest.fixture
def contents(tmp_path):
    catalog = make_catalog(tmp_path, LAYERS, EXPERTS)
    size = max(read_sizes(catalog, 4096))
    pools = ((size, 2 * EXPERTS, (0, 2)), (size + 4096, EXPERTS, (1,)))
    return Contents(catalog, pools, "auto", warm=True)


def begun(contents, *, memory=0):
    """A head start that remembers ``contents`` and has begun."""
    HeadStart("model", None).remember(contents, memory)
    start = HeadStart("model", None)
    start.begin()
    return start


def record():
    (path,) = cache_dir("starts").glob("*.json")
    return path


def test_it_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from gangline.runtime.head_start import HeadStart; HeadStart('x').begin();"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_store_has_every_expert_where_it_was_to_be(contents):
    start = begun(contents)
    caches = [FIFO(), FIFO()]
    store = start.claim(contents, caches)
    store.bind_with(lambda layer, raws: raws)
    wait_for_all(store, contents.catalog, False)
    for key in contents.catalog.extents:
        for field, raw in enumerate(store.bound(key)):
            assert raw.numpy().tobytes() == expected_bytes(key, field).tobytes()
    start.close()
    assert store.residency().keys() == contents.catalog.extents.keys()
    # Its own caches know of everybody, and go on from there.
    assert caches[0].victim(0, lambda key: True) == ExpertKey(0, 0)
    assert caches[1].victim(1, lambda key: True) == ExpertKey(1, 0)
    store.close()


def test_memory_is_counted_while_it_is_taken(contents):
    start = begun(contents)
    assert start.taken_bytes == sum(size * count for size, count, _ in contents.pools)
    start.close()
    assert start.taken_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, pools=((c.pools[0][0], 2 * EXPERTS + 1, (0, 2)), c.pools[1])),
        lambda c: replace(c, io="cached"),
        lambda c: replace(c, catalog=replace(c.catalog, checksums=None)),
        lambda c: replace(c, catalog=other_place(c.catalog)),
    ],
)
def test_other_contents_are_refused_and_forgotten(contents, change):
    start = begun(contents)
    store = start._store
    assert store is not None
    assert start.claim(change(contents), [FIFO(), FIFO()]) is None
    assert store._closed
    assert not list(cache_dir("starts").glob("*.json"))


def other_place(catalog: ExpertCatalog) -> ExpertCatalog:
    key, parts = next(iter(catalog.extents.items()))
    moved = (replace(parts[0], offset=parts[0].offset + 1), *parts[1:])
    return replace(catalog, extents=catalog.extents | {key: moved})


def test_nothing_begins_for_another_question(contents):
    begun(contents).close()
    HeadStart("model", None).remember(contents, 0)
    for other in (HeadStart("model"), HeadStart("model", "main"), HeadStart("models", None)):
        other.begin()
        assert other._store is None
        assert other.claim(contents, []) is None
    assert record().exists()


def test_a_file_that_has_changed_is_not_read(contents):
    HeadStart("model", None).remember(contents, 0)
    (path,) = contents.catalog.files
    os.utime(path, ns=(1, 1))
    start = HeadStart("model", None)
    start.begin()
    assert start._store is None


def test_it_takes_no_memory_that_is_not_there(contents, monkeypatch):
    for available, starts in ((99, False), (100, True)):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda memory=memory: memory)
        start = begun(contents, memory=100)
        assert (start._store is not None) is starts
        start.close()


def test_a_damaged_record_is_not_used(contents, seed):
    HeadStart("model", None).remember(contents, 0)
    whole = record().read_text()
    chance = random.Random(seed)
    damaged = [whole[: chance.randrange(len(whole))], "", "[]", "null", '{"files": 3}']
    found = json.loads(whole)
    for name in found:
        if name in ("io", "warm"):  # any value reads the same bytes; the loader refuses what is not its own
            continue
        for value in ("x", [["x"]], None, 7.5):
            if (name, value) not in (("checksums", None), ("memory", 7.5)):
                damaged.append(json.dumps(found | {name: value}))
    for wrong in ([1, 0, 5], [-1, 0, 5], [0, -4096, 5], [0, 0, 0], [0, "0", 5]):
        extents = [[0, 0, [wrong] * 3], *found["extents"][1:]]
        damaged.append(json.dumps(found | {"extents": extents}))
    damaged.append(json.dumps(found | {"pools": [[4096, 12, [0, 1, 2]]]}))  # smaller than an expert
    damaged.append(json.dumps(found | {"pools": [[1 << 20, 12, [0, 1, 2, 3]]]}))
    for text in damaged:
        record().write_text(text)
        start = HeadStart("model", None)
        start.begin()
        assert start._store is None, text


def test_a_cache_that_cannot_be_written_only_costs_the_head_start(contents, monkeypatch):
    def refuse(*parts):
        raise PermissionError("read only")

    monkeypatch.setattr(module, "cache_dir", refuse)
    start = HeadStart("model", None)
    start.remember(contents, 0)
    start.begin()
    assert start._store is None
    start.close()


def test_slots_that_are_too_small_are_refused(contents):
    (_, count, layers), other = contents.pools
    tight = replace(contents, pools=((4096, count, layers), other))
    with pytest.raises(gangline.core.errors.StoreError, match="slots of"):
        open_contents(tight, [FIFO(), FIFO()])


def test_memory_of_the_head_start_is_no_memory_of_the_process(monkeypatch, seed):
    filled = random.Random(seed).randrange(1, 1 << 30)
    memory = SimpleNamespace(available=5 << 30, rss=3 << 30)
    monkeypatch.setattr(options.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(options.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory))
    config = tiny_model("olmoe", seed=seed).config
    start = SimpleNamespace(taken_bytes=filled)
    plain = options.plan_request(options.LoadOptions(), config, model="m")
    ahead = options.plan_request(options.LoadOptions(head_start=start), config, model="m")
    assert plain.process - ahead.process == filled
    assert ahead.available == int((memory.available + filled) * 0.9)


@pytest.fixture
def saved(tmp_path, seed):
    model = tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits_and_store(folder, **more):
    start = HeadStart(str(folder))
    start.begin()
    store = start._store
    model = gangline.load(folder, head_start=start, progress=False, **more)
    with model.gangline as runtime, torch.no_grad():
        ids = torch.arange(12).view(1, -1)
        return model(ids).logits, store, runtime.store


def test_the_second_load_begins_early_and_says_the_same(saved):
    first, none, _ = logits_and_store(saved)
    assert none is None
    second, begun_store, used = logits_and_store(saved)
    assert begun_store is not None
    assert begun_store is used
    assert torch.equal(first, second)


def test_a_load_that_wants_something_else_opens_a_store_of_its_own(saved):
    logits_and_store(saved)
    wanted, _, _ = logits_and_store(saved, memory="4GiB")
    logits_and_store(saved)
    found, begun_store, used = logits_and_store(saved, precision="int8")
    assert begun_store is not None
    assert begun_store is not used
    assert begun_store._closed
    assert found.shape == wanted.shape


@pytest.mark.parametrize("pieces", [0, 1, 3, 100])
def test_it_may_be_claimed_while_it_takes_memory(contents, monkeypatch, pieces):
    """``pieces``: of memory that it has taken when somebody claims it; the rest comes with the reads."""
    monkeypatch.setattr(slots, "_PIECE", 8192)
    HeadStart("model", None).remember(contents, 0)
    start = HeadStart("model", None)
    reached, real = threading.Event(), ExpertStore.take_pages

    def take_pages(store):
        for number, taken in enumerate(real(store)):
            if number >= pieces:
                reached.set()
                start._over.wait()
            yield taken
        reached.set()

    monkeypatch.setattr(ExpertStore, "take_pages", take_pages)
    thread = threading.Thread(target=start.begin)
    thread.start()
    assert reached.wait(30)
    store = start.claim(contents, [FIFO(), FIFO()])
    thread.join(30)
    assert not thread.is_alive()
    store.bind_with(lambda layer, raws: raws)
    wait_for_all(store, contents.catalog, False)
    for key in contents.catalog.extents:
        for field, raw in enumerate(store.bound(key)):
            assert raw.numpy().tobytes() == expected_bytes(key, field).tobytes()
    store.close()


def test_what_is_closed_before_it_begins_never_begins(contents):
    HeadStart("model", None).remember(contents, 0)
    start = HeadStart("model", None)
    start.close()
    start.begin()
    assert start._store is None
    assert record().exists()
