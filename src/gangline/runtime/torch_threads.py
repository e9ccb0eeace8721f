"""Send torch's idle threads to sleep before the native core computes.

torch's OpenMP threads (libgomp) spin for milliseconds after every parallel operation, waiting for the next.
On a machine with as many threads as cores they hold the cores that the native core's threads want. OpenMP
5.0 lets a program give the threads back; the next parallel operation starts new ones.
"""

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_MAPS = Path("/proc/self/maps")
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SOFT = 1  # omp_pause_soft: keep what threads have stored


def pause_torch_threads() -> None:
    """End torch's idle threads, where torch computes with libgomp; not to be called inside a torch operation.

    Nothing where the environment says how long they wait (the command line does): that costs less.
    """
    _pause()(_SOFT)


@cache
def _pause() -> Callable[[int], object]:
    """Return ``omp_pause_resource_all`` of the libgomp that torch loaded, or a function that does nothing."""
    if _MAPS.is_file() and not any(name in os.environ for name in _WAITING):
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            path = line.split(maxsplit=5)[-1]
            if "libgomp" in path and path.startswith("/"):
                found = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
                if found is not None:
                    return found  # type: ignore[no-any-return]
    _log.debug("no libgomp to pause")
    return lambda kind: None


class TorchThreads:
    """Lets torch compute in one thread between native passes.

    Where native workers and readers hold the cores, every operation that torch splits waits until its other
    threads get one, which takes milliseconds; what is left for torch there is small.
    """

    def __init__(self) -> None:
        self._many: int | None = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Allow :meth:`one` meanwhile, and leave the number of threads as it was."""
        if self._many is not None:  # an outer call gives them back
            yield
            return
        self._many = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(self._many)
            self._many = None

    def one(self) -> None:
        """Use one thread from here on, where :meth:`lent` allows it."""
        if self._many is not None and torch.get_num_threads() > 1:
            torch.set_num_threads(1)

    def many(self) -> None:
        """Use as many threads as before."""
        if self._many is not None and torch.get_num_threads() != self._many:
            torch.set_num_threads(self._many)
