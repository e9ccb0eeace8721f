"""The physical limits right before and right after a run: the most that the machine showed around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gangline.runtime import best_bandwidth

T = TypeVar("T")


@dataclass(frozen=True)
class Beside:
    """Bandwidth before and after a run, in bytes/s; each the best of many short windows."""

    before: float
    after: float

    @property
    def best(self) -> float:
        """The bandwidth to judge the run by: a limit is the most that was seen, not a mean."""
        return max(self.before, self.after)

    def share(self, nbytes: float, seconds: float) -> float:
        """Share of this limit that moving ``nbytes`` in ``seconds`` reached."""
        return nbytes / self.best / seconds


def best_disk(files: Sequence[Path], size: int) -> float:
    """Return the best bytes/s of reading records of ``size`` bytes (see ``runtime.best_bandwidth``)."""
    return best_bandwidth.best_disk(files, size).rate


def beside_disk(files: Sequence[Path], size: int, run: Callable[[], T]) -> tuple[T, Beside]:
    """Return what ``run`` returns, and the disk's bandwidth around it."""
    return _beside(lambda: best_disk(files, size), run)


def beside_ram(threads: int, run: Callable[[], T]) -> tuple[T, Beside]:
    """Return what ``run`` returns, and the memory's bandwidth around it."""
    return _beside(lambda: best_bandwidth.best_ram(threads), run)


def _beside(measure: Callable[[], float], run: Callable[[], T]) -> tuple[T, Beside]:
    before = measure()
    result = run()
    return result, Beside(before, measure())
