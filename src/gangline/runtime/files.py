"""Read-only files for expert bytes, past the page cache where the file system can do that."""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gangline.core.errors import CheckpointError, UsageError

IOMode = Literal["auto", "direct", "cached"]
ALIGN = 4096
# Buffered reads need no alignment, but a product may round differently where the address of a matrix modulo
# 16 differs (seen with one fp32 row): both ways of reading keep the offset modulo a cache line.
_LINE = 64
ENDED = -1
"""Stands for a file that ends too early, where else an errno does."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class ExpertFiles:
    """Open files of a catalog.

    ``direct`` reads bypass the page cache, so that a byte lies in memory once and the budget is the whole
    truth; offsets, lengths and addresses must then be multiples of ``align``. ``auto`` takes direct where it
    works.

    Args:
        paths: the files.
        mode: how to read.
        warm: with ``auto``, copy what the page cache happens to hold from there; no page is added to it. For
            reads that are done once, where no budget counts the pages.

    Raises:
        CheckpointError: a file cannot be opened.
        UsageError: ``direct`` was asked for and the file system refuses it.
    """

    def __init__(self, paths: Sequence[Path], mode: IOMode, *, warm: bool = False) -> None:
        self._paths = list(paths)
        self._fds: list[int] = []
        self._warm: list[int] = []
        self.direct = mode != "cached" and all(_direct_works(path) for path in self._paths)
        if mode == "direct" and not self.direct:
            raise UsageError(f"direct reads do not work on the file system of {paths[0]}; use --io cached")
        warm = warm and mode == "auto" and self.direct and hasattr(os, "RWF_NOWAIT")
        for path in self._paths:
            try:
                self._fds.append(os.open(path, os.O_RDONLY | (_O_DIRECT if self.direct else 0)))
                if warm:
                    self._warm.append(os.open(path, os.O_RDONLY))
            except OSError as error:
                self.close()
                raise CheckpointError(f"cannot open {path}: {error.strerror}; restore the file") from error

    @property
    def align(self) -> int:
        """Multiple that offsets, lengths and addresses of a read must keep."""
        return ALIGN if self.direct else _LINE

    def read(self, file: int, offset: int, view: memoryview, wanted: int) -> None:
        """Fill ``view`` from ``offset``; the file may end after ``wanted`` bytes.

        Raises:
            CheckpointError: the file ends too early or cannot be read.
        """
        done = self._read_warm(file, offset, view, wanted) if self._warm else 0
        while done < wanted:
            try:
                count = os.preadv(self._fds[file], [view[done:]], offset + done)
            except OSError as error:
                raise self.failure(file, error.errno or errno.EIO, offset + done, wanted - done) from error
            if count == 0:
                raise self.failure(file, ENDED, offset + done, wanted - done)
            done += count

    def descriptors(self) -> tuple[list[int], list[int]]:
        """Return the open files, and the same through the page cache where that is asked first."""
        return list(self._fds), list(self._warm)

    def failure(self, file: int, code: int, offset: int, missing: int) -> CheckpointError:
        """Return what to raise where bytes at ``offset`` cannot be read; ``code``: errno, or ``ENDED``."""
        if code == ENDED:
            return CheckpointError(
                f"{self._paths[file]} ends at byte {offset}, {missing} bytes short; "
                "download or convert it again"
            )
        return CheckpointError(f"cannot read {self._paths[file]}: {os.strerror(code)}; check the disk")

    def _read_warm(self, file: int, offset: int, view: memoryview, wanted: int) -> int:
        """Return how many bytes the page cache gave without waiting: all, or a multiple of ``align``."""
        try:
            count = os.preadv(self._warm[file], [view], offset, os.RWF_NOWAIT)
        except OSError:  # nothing there, or a file system that cannot say: the disk has everything
            return 0
        return count if count >= wanted else count - count % self.align

    def close(self) -> None:
        """Close all files."""
        for descriptors in (self._fds, self._warm):
            while descriptors:
                os.close(descriptors.pop())


def _direct_works(path: Path) -> bool:
    if not _O_DIRECT or not hasattr(os, "preadv"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | _O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise CheckpointError(f"cannot open {path}: {error.strerror}; restore the file") from error
    try:
        with mmap.mmap(-1, ALIGN) as page:
            os.preadv(fd, [page], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
