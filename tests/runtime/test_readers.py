"""Reads of experts: what both pools do, and the native one's order."""

import os
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


def ticket_of(plan, memory, place, done, priority=Priority.DEMAND):
    view = memoryview(memory)[place : place + plan.nbytes]
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data + place
    return Ticket(plan, view, address, priority, done)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("mode", ["auto", "cached"])
def test_every_ticket_is_read_and_told_of_once(stored, seed, reads, mode, warm):
    path, content = stored
    rng = np.random.default_rng(seed)
    files = ExpertFiles([path], mode, warm=warm)
    memory, done = map_anonymous(64 * 4 * ALIGN), Counter()
    pool = Readers(files, 3)
    tickets, wanted = [], []
    for number in range(64):
        pages = rng.choice(PAGES, int(rng.integers(1, 5)), replace=False).tolist()
        ticket = ticket_of(
            plan_of(pages),
            memory,
            number * 4 * ALIGN,
            lambda ended: done.update([ended]),
            Priority(int(rng.integers(4))),
        )
        tickets.append(ticket)
        wanted.append(b"".join(content[page * ALIGN : (page + 1) * ALIGN].tobytes() for page in pages))
        pool.submit(ticket)
        other = tickets[int(rng.integers(len(tickets)))]
        pool.change(other, Priority(int(rng.integers(4))))
    dropped = {ticket for ticket in tickets[::5] if pool.cancel(ticket)}
    while len(done) < len(tickets) - len(dropped):
        os.sched_yield()
    pool.close()
    files.close()
    assert set(done) == set(tickets) - dropped and set(done.values()) == {1}
    for number, (ticket, expected) in enumerate(zip(tickets, wanted, strict=True)):
        if ticket not in dropped:
            begin = number * 4 * ALIGN
            assert ticket.error is None and memory[begin : begin + len(expected)] == expected


def test_a_file_that_ends_is_named(stored, reads):
    path, _ = stored
    files, memory, done = ExpertFiles([path], "auto"), map_anonymous(4 * ALIGN), []
    pool = Readers(files, 1)
    ticket = ticket_of(plan_of([0, PAGES]), memory, 0, done.append)
    pool.submit(ticket)
    while not done:
        os.sched_yield()
    pool.close()
    files.close()
    assert str(path) in str(ticket.error) and f"{ALIGN} bytes short" in str(ticket.error)


@needs_native
def test_native_reads_keep_the_order(stored):
    path, _ = stored
    files, memory = ExpertFiles([path], "auto"), map_anonymous(PAGES * ALIGN)
    pool = readers.NativeReads(files, native())
    asked = [(0, Priority.PREFETCH), (1, Priority.PREFETCH), (2, Priority.BACKGROUND), (3, Priority.DEMAND)]
    tickets = [
        ticket_of(plan_of([n, n + 9]), memory, 2 * n * ALIGN, lambda _: None, priority)
        for n, priority in asked
    ]
    for ticket in tickets:
        pool.submit(ticket)
    late = ticket_of(plan_of([5]), memory, 20 * ALIGN, lambda _: None, Priority.DEMAND)
    pool.submit(late)
    pool.change(tickets[2], Priority.CORRECTION)
    assert pool.cancel(tickets[1]) and not pool.cancel(tickets[1])
    assert [pool.work() for _ in range(4)] == [tickets[3], late, tickets[2], tickets[0]]
    assert not pool.cancel(tickets[0])
    pool.close()
    assert pool.work() is None
    files.close()
