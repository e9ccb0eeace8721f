"""The most that disk and memory showed: an upper bound, where :mod:`gangline.runtime.bandwidth` gives a mean.

A shared machine's disk swings by a factor of two within a second, so a mean of one way of reading lies below
what a busy program reaches. Here many short windows are measured, the ways of reading in turns, and the best
window counts.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gangline.core.sizes import format_size
from gangline.runtime.bandwidth import MIB, measure_disk, measure_ram
from gangline.runtime.read_plan import CHUNK

WINDOW = 0.15
ROUNDS = 2
RAM_WINDOWS = 4
_IO_COUNTERS = Path("/proc/self/io")


@dataclass(frozen=True)
class Way:
    """One way of reading records.

    Attributes:
        chunk: bytes of one read.
        depth: reads in flight.
        direct: around the page cache.
    """

    chunk: int
    depth: int
    direct: bool = True

    def __str__(self) -> str:
        return f"{'direct' if self.direct else 'cached'}, {format_size(self.chunk)}, depth {self.depth}"


@dataclass(frozen=True)
class DiskPeak:
    """The fastest window.

    Attributes:
        rate: bytes/s.
        way: how it was read, in words.
        windows: how many were measured.
    """

    rate: float
    way: str
    windows: int


def ways_to_read(record: int) -> list[Way]:
    """Return the ways that are tried for records of that many bytes: the store's own first."""
    ways = [
        Way(min(CHUNK, record), 4),
        Way(record, 2),
        Way(min(CHUNK, record), 8),
        Way(min(MIB, record), 8),
        Way(min(CHUNK, record), 4, direct=False),
    ]
    return list(dict.fromkeys(ways))


def best_disk(
    files: Sequence[Path], record: int, *, rounds: int = ROUNDS, window: float = WINDOW
) -> DiskPeak:
    """Return the fastest of ``rounds`` windows of each way of reading records at random places.

    Args:
        files: each window reads one of them, drawn at random: a host that caches a virtual disk makes a file
            that was just read look faster than the disk is.
        record: bytes that lie together, for example an expert.
        rounds: windows of each way, in turns.
        window: seconds of one window.

    Raises:
        UsageError: a file is missing or smaller than a record.
    """
    ways = ways_to_read(record)
    best = DiskPeak(0.0, "", rounds * len(ways))
    for _ in range(rounds):
        for way in ways:
            rate = _window(random.choice(files), record, way, window)
            if rate > best.rate:
                best = DiskPeak(rate, str(way), best.windows)
    return best


def best_ram(threads: int) -> float:
    """Return bytes/s of the fastest window of ``threads`` threads reading memory."""
    return measure_ram(threads, seconds=WINDOW, windows=RAM_WINDOWS)


def _window(file: Path, record: int, way: Way, seconds: float) -> float:
    def read() -> float:
        return measure_disk(
            file, size=record, chunk=way.chunk, depth=way.depth, seconds=seconds, direct=way.direct
        )

    return read() if way.direct else _at_most_delivered(read)


def _at_most_delivered(read: Callable[[], float]) -> float:
    """Return the rate of ``read``, or what the disk delivered meanwhile if that is less.

    Pages that another process maps stay in the page cache; reading them is no reading of the disk.
    """
    before, start = _delivered(), time.perf_counter()
    rate = read()
    after, seconds = _delivered(), time.perf_counter() - start
    return rate if before is None or after is None else min(rate, (after - before) / seconds)


def _delivered() -> int | None:
    """Return the bytes that the disk delivered to this process so far, None where the system does not say."""
    if not _IO_COUNTERS.is_file():
        return None
    counters = dict(line.split(": ") for line in _IO_COUNTERS.read_text().splitlines())
    return int(counters["read_bytes"])
