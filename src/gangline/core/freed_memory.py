"""Keep what tensors leave for the tensors that come next, where large ones come and go all the time.

glibc's ``malloc`` maps every large block anew and gives it back when it is freed, so that the kernel must
find and zero its pages each time: on a virtual machine that takes longer than adding two matrices. What
trains or prunes on a CPU frees and asks for gigabytes a second.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of malloc.h: how much may lie free at the heap's end, by how much the heap grows, and from which size blocks
# are mapped by themselves. That has an upper limit of 32 MiB; and without one the heap would grow at every
# large block that fits into none of its holes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 64 << 20}
# Where glibc's own adaptation to large blocks ends: once anything is set it does not adapt any more.
_AFTER = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 0}


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let freed blocks of up to 32 MiB stay with the process until the end of the context.

    At most 1 GiB at the heap's end, and the holes below; not for work within a budget, nor where what stays
    is allocated between what goes. Yields whether the C library does it.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "malloc_trim"):  # not glibc
        yield False
        return
    taken = [library.mallopt(name, value) for name, value in _KEEP.items()]
    try:
        yield all(taken)
    finally:
        for name, value in _AFTER.items():
            library.mallopt(name, value)
        library.malloc_trim(ctypes.c_size_t(0))
