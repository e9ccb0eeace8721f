"""The physical limits, measured right before and right after a run and averaged: they move from minute to
minute."""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gangline.runtime.bandwidth import measure_disk, measure_ram

T = TypeVar("T")
DEPTHS = (1, 2, 4)


@dataclass(frozen=True)
class Beside:
    """Bandwidth before and after a run, in bytes/s."""

    before: float
    after: float

    @property
    def mean(self) -> float:
        """The bandwidth to judge the run by."""
        return statistics.fmean((self.before, self.after))

    def share(self, nbytes: float, seconds: float) -> float:
        """Share of this limit that moving ``nbytes`` in ``seconds`` reached."""
        return nbytes / self.mean / seconds


def best_disk(files: Sequence[Path], size: int, *, seconds: float = 3.0) -> float:
    """Return the best bytes/s of reads of ``size`` bytes over queue depths 1, 2 and 4.

    Each depth reads one of ``files`` drawn at random: a host that caches a virtual disk makes a file that was
    just read look faster than the disk is.
    """
    share = seconds / len(DEPTHS)
    return max(measure_disk(random.choice(files), size=size, depth=depth, seconds=share) for depth in DEPTHS)


def beside_disk(files: Sequence[Path], size: int, run: Callable[[], T]) -> tuple[T, Beside]:
    """Return what ``run`` returns, and the disk's bandwidth around it."""
    return _beside(lambda: best_disk(files, size), run)


def beside_ram(threads: int, run: Callable[[], T]) -> tuple[T, Beside]:
    """Return what ``run`` returns, and the memory's bandwidth around it."""
    return _beside(lambda: measure_ram(threads), run)


def _beside(measure: Callable[[], float], run: Callable[[], T]) -> tuple[T, Beside]:
    before = measure()
    result = run()
    return result, Beside(before, measure())
