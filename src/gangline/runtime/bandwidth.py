"""How fast this machine reads expert-sized pieces of a file, and memory: the two limits of expert offloading.

Both numbers move from minute to minute on shared machines, so callers that report a share of the limit
measure it right before and right after the run they report.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gangline.core.errors import UsageError
from gangline.core.sizes import format_size
from gangline.kernels.cpu.huge_pages import map_anonymous

logger = logging.getLogger(__name__)

MIB = 2**20
# Requests must be multiples of the logical block for O_DIRECT; 4 KiB serves every common disk.
ALIGNMENT = 4096
SCRATCH_BYTES = 1024 * MIB
RAM_BLOCK_BYTES = 256 * MIB


def measure_disk(
    path: Path,
    *,
    size: int = 12 * MIB,
    chunk: int | None = None,
    depth: int = 2,
    seconds: float = 1.5,
    direct: bool = True,
) -> float:
    """Return bytes/s of reading records at random places of a file, ``depth`` reads in flight.

    The reads go around the page cache (O_DIRECT). On a file system without O_DIRECT the file's pages are
    dropped from the cache first instead, and a warning says so.

    Args:
        path: a file to read, or a folder: its largest file is read if it has at least 1 GiB, else a
            scratch file of 1 GiB is written there and removed.
        size: bytes of a record, rounded up to 4 KiB; an expert's size gives an expert's bandwidth.
        chunk: bytes of one read, rounded likewise; None reads a record at once.
        depth: reads in flight (one thread each).
        seconds: how long to read.
        direct: around the page cache; else through it, each read's pages dropped again at once.

    Raises:
        UsageError: the path does not exist, the file is smaller than one read, or the folder has no room.
    """
    if depth < 1:
        raise UsageError(f"queue depth {depth} is not above zero; give for example 2")
    size = _aligned(size)
    chunk = min(size, _aligned(chunk or size))
    with _file_to_read(Path(path), size) as file, _opened(file, direct) as fd:
        return _read_for(fd, _places(file, size, chunk), chunk, depth, seconds, direct)


@contextmanager
def scratch_file(folder: Path, nbytes: int = SCRATCH_BYTES) -> Iterator[Path]:
    """Write a file of random bytes into ``folder``, yield its path, and remove it afterwards.

    Raises:
        UsageError: the folder has no room.
    """
    scratch = folder / f".gangline-bandwidth-{os.getpid()}"
    try:
        _write_scratch(scratch, nbytes)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def measure_ram(threads: int, *, seconds: float = 1.0, windows: int = 1) -> float:
    """Return bytes/s at which ``threads`` threads together read memory far larger than the caches.

    Each thread sums its own 256 MiB of int64 over and over: one addition per 8 bytes, so memory limits it.

    Args:
        threads: how many read at once.
        seconds: length of a window.
        windows: how many to measure; the best counts.

    Raises:
        UsageError: ``threads`` is not above zero.
    """
    if threads < 1:
        raise UsageError(f"{threads} threads cannot read memory; give a number above zero")
    # Ones and not zeros: untouched zero pages would all be the same physical page.
    blocks = [np.ones(RAM_BLOCK_BYTES // 8, dtype=np.int64) for _ in range(threads)]

    def one_pass(thread: int) -> int:
        return blocks[thread].nbytes if blocks[thread].sum() else 0

    return max(_rate(one_pass, threads, seconds) for _ in range(windows))


def _rate(step: Callable[[int], int], threads: int, seconds: float) -> float:
    """Call ``step(thread)`` on every thread for ``seconds`` and return the bytes/s that the steps report."""
    done = [0] * threads
    start = threading.Barrier(threads)
    began = [0.0] * threads

    def work(thread: int) -> None:
        start.wait()
        began[thread] = time.perf_counter()
        while time.perf_counter() - began[thread] < seconds:
            done[thread] += step(thread)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, thread) for thread in range(threads)]:
            future.result()
    return sum(done) / (time.perf_counter() - min(began))


def _read_for(
    fd: int, places: Iterator[tuple[int, int]], chunk: int, depth: int, seconds: float, direct: bool
) -> float:
    # Anonymous maps start on a page, as O_DIRECT wants its buffers; writing makes the pages real beforehand.
    buffers = [map_anonymous(chunk) for _ in range(depth)]
    for buffer in buffers:
        buffer.write(b"\0" * chunk)
    lock = threading.Lock()

    def one_read(thread: int) -> int:
        with lock:
            place, length = next(places)
        with memoryview(buffers[thread]) as view, view[:length] as wanted:
            done = os.preadv(fd, [wanted], place)
        if not direct:
            _drop_pages(fd, place, length)
        return done

    try:
        return _rate(one_read, depth, seconds)
    finally:
        for buffer in buffers:
            buffer.close()


def _places(file: Path, size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield place and length of every read, record after record, in a new random order each time round."""
    records = list(range(file.stat().st_size // size))
    while True:
        random.shuffle(records)
        for record in records:
            for start in range(0, size, chunk):
                yield record * size + start, min(chunk, size - start)


def _aligned(nbytes: int) -> int:
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT


@contextmanager
def _opened(file: Path, direct: bool) -> Iterator[int]:
    fd = -1
    if direct:
        try:
            fd = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            logger.warning("%s cannot be read around the page cache; its bandwidth may be overstated", file)
    if fd < 0:
        fd = os.open(file, os.O_RDONLY)
        _drop_pages(fd, 0, 0)
    try:
        yield fd
    finally:
        os.close(fd)


def _drop_pages(fd: int, start: int, nbytes: int) -> None:
    """Drop the clean cached pages of a range (0 bytes: to the end of the file), where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_DONTNEED)


@contextmanager
def _file_to_read(path: Path, size: int) -> Iterator[Path]:
    if not path.exists():
        raise UsageError(
            f"cannot measure the disk: {path} does not exist; give a file or a folder on that disk"
        )
    if path.is_file():
        if path.stat().st_size < size:
            have = format_size(path.stat().st_size)
            raise UsageError(
                f"{path} has {have}, less than one read of {format_size(size)}; give a larger one"
            )
        yield path
        return
    large = max(path.iterdir(), key=_file_bytes, default=path)
    if _file_bytes(large) >= max(SCRATCH_BYTES, size):
        yield large
        return
    with scratch_file(path, max(SCRATCH_BYTES, size)) as scratch:
        yield scratch


def _file_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _write_scratch(path: Path, nbytes: int) -> None:
    # Random bytes: a disk that compresses or leaves out zeros must not look faster than it is.
    block = os.urandom(16 * MIB)
    try:
        with path.open("wb") as file:
            for start in range(0, nbytes, len(block)):
                file.write(block[: nbytes - start])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(
            f"cannot write {format_size(nbytes)} into {path.parent} to measure the disk ({error.strerror}); "
            "free some space or give a large file"
        ) from error
