"""Expert packs: exact contents, and nothing lost or half-written whatever happens while one is made."""

import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.pack_rig import TinySource, pack_in_a_process, record, same, visible
from gangline.checkpoint import pack as pack_module
from gangline.checkpoint import pack_partial
from gangline.checkpoint.pack import open_pack, pack_bits, verify_pack, write_pack
from gangline.checkpoint.pack_index import ALIGNMENT, read_index
from gangline.core.errors import CheckpointError, PackError
from gangline.core.keys import ExpertKey
from gangline.formats import get_codec


@pytest.fixture
def source(seed):
    return TinySource(seed)


def test_pack_holds_the_bytes_of_the_source(source, tmp_path):
    steps = []
    catalog = write_pack(
        source, tmp_path / "p", key="k", progress=lambda done, total: steps.append((done, total))
    )
    assert same(catalog, source)
    assert catalog.layouts == source.layouts
    assert open_pack(tmp_path / "p") == catalog == open_pack(tmp_path / "p", "k")
    assert verify_pack(tmp_path / "p") == sum(source.experts)
    assert visible(tmp_path) == ["p"] and visible(tmp_path / "p") == ["experts.bin", "index.json"]
    size = (tmp_path / "p" / "experts.bin").stat().st_size
    assert steps[0] == (0, size) and steps[-1] == (size, size) and steps == sorted(steps)
    assert pack_bits(tmp_path / "p") == 16


def test_records_are_aligned_and_their_fields_touch(source, tmp_path):
    catalog = write_pack(source, tmp_path / "p", key="k")
    for key, extents in catalog.extents.items():
        assert extents[0].offset % ALIGNMENT == 0
        for a, b in pairwise(extents):
            assert a.offset + a.nbytes == b.offset
        assert catalog.checksums[key] == zlib.crc32(source.raw(*key))


def test_finished_pack_is_used_again(source, tmp_path):
    write_pack(source, tmp_path / "p", key="k")
    source.reads.clear()
    assert same(write_pack(source, tmp_path / "p", key="k"), source)
    assert source.reads == []


def test_other_key_is_refused(source, tmp_path):
    write_pack(source, tmp_path / "p", key="k")
    with pytest.raises(PackError, match="another model or precision; delete it"):
        write_pack(source, tmp_path / "p", key="other")
    with pytest.raises(PackError, match="another model or precision; delete it"):
        open_pack(tmp_path / "p", "other")


def test_a_folder_of_the_user_is_left_alone(source, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "letter.txt").write_text("dear")
    with pytest.raises(PackError, match="not an expert pack"):
        write_pack(source, tmp_path / "p", key="k")
    assert visible(tmp_path / "p") == ["letter.txt"]


@pytest.mark.parametrize("codec", ["int4g32", "int8g64", "fp32"])
def test_recoded_pack(source, tmp_path, codec):
    catalog = write_pack(source, tmp_path / "p", key="k", codec=codec)
    verify_pack(tmp_path / "p")
    for key in catalog.extents:
        raw = torch.frombuffer(bytearray(record(catalog, *key)), dtype=torch.uint8)
        at = 0
        for spec, old, weight in zip(
            catalog.layouts[key.layer].fields,
            source.layouts[key.layer].fields,
            source.weights(*key),
            strict=True,
        ):
            plain = (weight.T if old.transposed else weight).float().contiguous()
            assert spec.shape == tuple(plain.shape) and spec.codec == codec and not spec.transposed
            assert torch.equal(raw[at : at + spec.nbytes], get_codec(codec).encode(plain))
            at += spec.nbytes
    assert pack_bits(tmp_path / "p") == pytest.approx(get_codec(codec).bits)


@pytest.mark.parametrize("stop", [(0, 0), (1, 2), (2, 4)])
def test_interrupted_pack_continues(seed, tmp_path, stop):
    def interrupt(layer, expert):
        if (layer, expert) == stop:
            raise KeyboardInterrupt

    source = TinySource(seed, on_expert=interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pack(source, tmp_path / "p", key="k")
    assert visible(tmp_path) == []
    fresh = TinySource(seed)
    assert same(write_pack(fresh, tmp_path / "p", key="k"), fresh)
    assert fresh.reads == list(range(stop[0], 3))
    assert visible(tmp_path) == ["p"] and not (tmp_path / ".p.partial").exists()
    verify_pack(tmp_path / "p")


def interrupted(seed: int, folder: Path, layer: int = 2, **options) -> Path:
    def interrupt(at, expert):
        if at == layer and expert == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(TinySource(seed, on_expert=interrupt), folder / "p", key="k", **options)
    return folder / ".p.partial"


def test_damaged_partial_layers_are_written_again(seed, tmp_path):
    partial = interrupted(seed, tmp_path)
    with (partial / "experts.bin").open("r+b") as stream:
        stream.seek(10)
        stream.write(b"\xff\x00\xff")
    source = TinySource(seed)
    assert same(write_pack(source, tmp_path / "p", key="k"), source)
    assert source.reads == [0, 1, 2]


@pytest.mark.parametrize("damage", ["torn", "short", "garbage", "no journal", "other key"])
def test_broken_journal_costs_only_time(seed, tmp_path, damage):
    partial = interrupted(seed, tmp_path)
    journal = partial / "journal.jsonl"
    text = journal.read_bytes()
    if damage == "torn":
        journal.write_bytes(text[:-7])
    elif damage == "short":
        os.truncate(partial / "experts.bin", 5000)
    elif damage == "garbage":
        journal.write_bytes(b"\x00" * 300)
    elif damage == "no journal":
        journal.unlink()
    else:
        journal.write_bytes(text.replace(b'"key": "k"', b'"key": "q"'))
    source = TinySource(seed)
    assert same(write_pack(source, tmp_path / "p", key="k"), source)
    assert source.reads[-1] == 2 and source.reads[0] == (1 if damage == "torn" else 0)


def test_too_little_room_is_said_before_the_start(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 << 20)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: usage)
    big = TinySource(0, layers=3, hidden=4096)
    with pytest.raises(PackError, match=r"needs .* MiB more, and the disk has 2.00 MiB free; make room"):
        write_pack(big, tmp_path / "p", key="k")
    assert visible(tmp_path) == [] and big.reads == []


def test_disk_that_fills_up_in_the_middle(seed, tmp_path, monkeypatch):
    real, written = os.pwrite, 0

    def pwrite(descriptor, data, position):
        nonlocal written
        written += len(data)
        if written > 150_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(pack_partial.os, "pwrite", pwrite)
    source = TinySource(seed)
    with pytest.raises(
        PackError, match=r"disk is full .*the whole expert pack takes .*continues where it stopped"
    ) as e:
        write_pack(source, tmp_path / "p", key="k")
    assert "\n" not in str(e.value) and visible(tmp_path) == []
    monkeypatch.undo()
    source.reads.clear()
    assert same(write_pack(source, tmp_path / "p", key="k"), source)
    assert source.reads[0] > 0


def test_file_size_limit_of_the_system(tmp_path):
    """A real write error from the kernel: a process that may not write more than 100 kB to a file."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[2]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY));"
        "from checkpoint.pack_rig import TinySource; from gangline.checkpoint.pack import write_pack;"
        "from gangline.core.errors import PackError\n"
        "try: write_pack(TinySource(1), sys.argv[1], key='k')\n"
        "except PackError as error: print('PackError', error)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    here = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p"), here], capture_output=True, text=True, check=True
    )
    assert "PackError" in run.stdout and "disk is full" in run.stdout, run.stderr
    assert visible(tmp_path) == []
    source = TinySource(1)
    assert same(write_pack(source, tmp_path / "p", key="k"), source)


def test_unreadable_source_is_not_blamed_on_the_pack(seed, tmp_path):
    def fail(layer, expert):
        raise OSError(errno.EIO, "Input/output error", "shard-1")

    with pytest.raises(CheckpointError, match="shard-1"):
        write_pack(TinySource(seed, on_expert=fail), tmp_path / "p", key="k")


def test_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match="cannot be written"):
        write_pack(source, tmp_path / "file" / "p", key="k")


def test_two_processes_make_one_pack(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, results = context.Event(), context.Queue()
    arguments = (str(tmp_path / "p"), started, results)
    workers = [context.Process(target=pack_in_a_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert found == [(0, True), (3, True)]
    verify_pack(tmp_path / "p")


class LetGoOn(logging.Handler):
    """Sets an event as soon as something is logged."""

    def __init__(self, go_on) -> None:
        super().__init__()
        self.go_on = go_on

    def emit(self, record: logging.LogRecord) -> None:
        self.go_on.set()


def test_the_one_that_waits_says_so(tmp_path, caplog):
    context = multiprocessing.get_context("spawn")
    started, go_on, results = context.Event(), context.Event(), context.Queue()
    worker = context.Process(target=pack_in_a_process, args=(str(tmp_path / "p"), started, results, go_on))
    worker.start()
    assert started.wait(timeout=120)
    source, logger, handler = TinySource(7), logging.getLogger("gangline"), LetGoOn(go_on)
    logger.addHandler(handler)
    try:
        catalog = write_pack(source, tmp_path / "p", key="k")
    finally:
        logger.removeHandler(handler)
    worker.join(timeout=30)
    assert "another process is making the expert pack" in caplog.text
    assert source.reads == [] and same(catalog, source)


def test_a_killed_process_leaves_a_pack_that_can_be_continued(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, never, results = context.Event(), context.Event(), context.Queue()
    worker = context.Process(target=pack_in_a_process, args=(str(tmp_path / "p"), started, results, never))
    worker.start()
    assert started.wait(timeout=120)
    worker.kill()
    worker.join()
    assert visible(tmp_path) == []
    source = TinySource(7)
    assert same(write_pack(source, tmp_path / "p", key="k"), source)
    assert source.reads == [1, 2]


def test_damaged_expert_is_named(source, tmp_path):
    catalog = write_pack(source, tmp_path / "p", key="k")
    extent = catalog.extents[ExpertKey(1, 2)][1]
    with (tmp_path / "p" / "experts.bin").open("r+b") as stream:
        stream.seek(extent.offset + 5)
        byte = stream.read(1)[0]
        stream.seek(extent.offset + 5)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(PackError, match=r"layer 1, expert 2 fails its checksum; delete the folder"):
        verify_pack(tmp_path / "p")


def test_cut_or_missing_data_file(source, tmp_path):
    write_pack(source, tmp_path / "p", key="k")
    data = tmp_path / "p" / "experts.bin"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(PackError, match="where the index says"):
        open_pack(tmp_path / "p")
    data.unlink()
    with pytest.raises(PackError, match="cannot be read"):
        open_pack(tmp_path / "p")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "p"
    write_pack(TinySource(3), folder, key="k")
    return folder


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


junk = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=3)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=junk)
def test_any_change_of_the_index_is_noticed_or_harmless(finished, tmp_path, data, value):
    """Whatever one entry of the index becomes: a PackError, or a catalog inside of the file."""
    folder = tmp_path / "q"
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    document = json.loads((finished / "index.json").read_text())
    path = data.draw(st.sampled_from([p for p in paths(document) if p]))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (folder / "index.json").write_text(json.dumps(document))
    check_catalog(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=100), at=st.floats(0, 1))
def test_any_bytes_as_index(finished, tmp_path, text, at):
    folder = tmp_path / "q"
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    whole = (finished / "index.json").read_bytes()
    cut = int(at * len(whole))
    (folder / "index.json").write_bytes(whole[:cut] + text + whole[cut + len(text) :])
    check_catalog(folder)


def check_catalog(folder: Path) -> None:
    try:
        catalog = open_pack(folder)
    except PackError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    size = (folder / "experts.bin").stat().st_size
    assert read_index(folder).layout.nbytes == size
    assert all(e.offset + e.nbytes <= size for extents in catalog.extents.values() for e in extents)
    with_sums = catalog.checksums
    assert set(with_sums) == set(catalog.extents)
