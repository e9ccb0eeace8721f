"""Reads of experts: what both pools do, and the native one's order."""

import dataclasses
import zlib
from collections import Counter

import numpy as np
import pytest

from gangline.core.tiers import Priority
from gangline.kernels.cpu import native
from gangline.kernels.cpu.huge_pages import map_anonymous
from gangline.runtime import readers
from gangline.runtime.files import ALIGN, ExpertFiles
from gangline.runtime.read_plan import Chunk, ReadPlan
from gangline.runtime.readers import Readers, Ticket

PAGES = 40

needs_native = pytest.mark.skipif(not hasattr(native(), "ReadPool"), reason="no native reads here")


@pytest.fixture(params=["python", pytest.param("native", marks=needs_native)])
def reads(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(readers, "native", lambda: None)


@pytest.fixture
def stored(tmp_path, seed):
    """A file of random pages, and what is in it."""
    content = np.random.default_rng(seed).integers(0, 256, PAGES * ALIGN, dtype=np.uint8)
    path = tmp_path / "experts"
    path.write_bytes(content.tobytes())
    return path, content


def plan_of(pages, file=0):
    """A chunk for every page, one behind the other in the slot."""
    chunks = tuple(Chunk(file, page * ALIGN, ALIGN, ALIGN, n * ALIGN) for n, page in enumerate(pages))
    return ReadPlan(chunks, ((0, len(pages) * ALIGN),), len(pages) * ALIGN)


def ticket_of(plan, memory, place, priority=Priority.DEMAND, crc=None):
    view = memoryview(memory)[place : place + plan.nbytes]
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data + place
    return Ticket(plan, view, address, priority, lambda _: None, crc)


def ended(pool, count):
    """Take tickets until there are so many."""
    found = []
    while True:
        seen = pool.changes()
        found += pool.finished()
        if len(found) >= count:
            return found
        pool.wait(seen)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("mode", ["auto", "cached"])
def test_every_ticket_is_read_and_told_of_once(stored, seed, reads, mode, warm):
    path, content = stored
    rng = np.random.default_rng(seed)
    files = ExpertFiles([path], mode, warm=warm)
    memory = map_anonymous(64 * 4 * ALIGN)
    pool = Readers(files, 3)
    tickets, wanted = [], []
    for number in range(64):
        pages = rng.choice(PAGES, int(rng.integers(1, 5)), replace=False).tolist()
        ticket = ticket_of(
            plan_of(pages),
            memory,
            number * 4 * ALIGN,
            Priority(int(rng.integers(4))),
        )
        tickets.append(ticket)
        wanted.append(b"".join(content[page * ALIGN : (page + 1) * ALIGN].tobytes() for page in pages))
        pool.submit(ticket)
        other = tickets[int(rng.integers(len(tickets)))]
        pool.change(other, Priority(int(rng.integers(4))))
    dropped = {ticket for ticket in tickets[::5] if pool.cancel(ticket)}
    done = Counter(ended(pool, len(tickets) - len(dropped)))
    pool.close()
    files.close()
    assert set(done) == set(tickets) - dropped and set(done.values()) == {1}
    for number, (ticket, expected) in enumerate(zip(tickets, wanted, strict=True)):
        if ticket not in dropped:
            begin = number * 4 * ALIGN
            assert ticket.error is None and memory[begin : begin + len(expected)] == expected


def test_a_file_that_ends_is_named(stored, reads):
    path, _ = stored
    files, memory = ExpertFiles([path], "auto"), map_anonymous(4 * ALIGN)
    pool = Readers(files, 1)
    ticket = ticket_of(plan_of([0, PAGES]), memory, 0)
    pool.submit(ticket)
    assert ended(pool, 1) == [ticket]
    pool.close()
    files.close()
    assert str(path) in str(ticket.error) and f"{ALIGN} bytes short" in str(ticket.error)


def test_checksums_are_compared_where_they_are_given(stored, reads, seed):
    path, content = stored
    files, memory = ExpertFiles([path], "auto"), map_anonymous(4 * ALIGN)
    pool = Readers(files, 2)
    page = int(np.random.default_rng(seed).integers(PAGES - 1))
    first, second = (content[n * ALIGN : (n + 1) * ALIGN].tobytes() for n in (page, page + 1))
    both = zlib.crc32(second, zlib.crc32(first[64:]))
    fields = ((64, ALIGN - 64), (ALIGN, ALIGN))
    plan = dataclasses.replace(plan_of([page, page + 1]), fields=fields)
    right, wrong, unchecked = (
        ticket_of(plan, memory, 0, crc=crc) for crc in (both, both ^ 1 << page % 32, None)
    )
    for ticket in (right, wrong, unchecked):
        pool.submit(ticket)
        assert ended(pool, 1) == [ticket]
    pool.close()
    files.close()
    assert [ticket.corrupt for ticket in (right, wrong, unchecked)] == [False, True, False]


def test_a_poke_wakes_who_waits_and_close_waits_for_reads(stored, reads):
    path, content = stored
    files, memory = ExpertFiles([path], "auto"), map_anonymous(PAGES * ALIGN)
    pool = Readers(files, 2)
    seen = pool.changes()
    pool.wait(seen)  # nothing changes: it comes back all the same
    assert pool.changes() == seen
    pool.poke()
    assert pool.changes() != seen
    pool.wait(seen)
    pool.submit(ticket_of(plan_of(range(PAGES)), memory, 0))
    pool.close()
    pool.close()
    after = bytes(memory)
    assert all(
        after[n * ALIGN : (n + 1) * ALIGN] in (bytes(ALIGN), content[n * ALIGN : (n + 1) * ALIGN].tobytes())
        for n in range(PAGES)
    )
    assert bytes(memory) == after
    files.close()


@needs_native
def test_native_reads_keep_the_order(stored):
    path, _ = stored
    files, memory = ExpertFiles([path], "auto"), map_anonymous(PAGES * ALIGN)
    pool = readers.NativeReads(files, native(), threads=0)
    asked = [(0, Priority.PREFETCH), (1, Priority.PREFETCH), (2, Priority.BACKGROUND), (3, Priority.DEMAND)]
    tickets = [ticket_of(plan_of([n, n + 9]), memory, 2 * n * ALIGN, priority) for n, priority in asked]
    for ticket in tickets:
        pool.submit(ticket)
    late = ticket_of(plan_of([5]), memory, 20 * ALIGN, Priority.DEMAND)
    pool.submit(late)
    pool.change(tickets[2], Priority.CORRECTION)
    assert pool.cancel(tickets[1]) and not pool.cancel(tickets[1])
    order = []
    for _ in range(4):
        assert pool.work()
        order += pool.finished()
    assert order == [tickets[3], late, tickets[2], tickets[0]]
    assert not pool.cancel(tickets[0])
    pool.close()
    assert not pool.work()
    files.close()
