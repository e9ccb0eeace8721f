"""Memory in huge pages: what is read from end to end for every token then misses the TLB rarely.

Linux gives huge pages to private anonymous mappings that ask for them. Memory of ``malloc``, and of
``mmap.mmap(-1, n)`` as Python maps it by default (shared), stays in pages of 4 KiB on most machines.
"""

import math
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HUGE_PAGE = 2 << 20


def map_anonymous(nbytes: int) -> mmap.mmap:
    """Return at least so many zeros on a page boundary; physical pages are taken as they are written.

    Raises:
        OSError: there is no address space left.
    """
    whole = nbytes // HUGE_PAGE * HUGE_PAGE
    if not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, nbytes)
    # The kernel aligns what is a multiple of a huge page. The last piece stays in small pages: a huge one
    # would take more memory than it is asked for.
    length = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE, 0, whole)
    return mapped


def empty(shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
    """Return a tensor on the CPU as ``torch.empty`` does, in huge pages if it is as large as one.

    Raises:
        OSError: there is no address space left.
    """
    import torch  # the other function is wanted before torch is there

    count = math.prod(shape)
    if count * dtype.itemsize < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    mapped = map_anonymous(count * dtype.itemsize)
    return torch.frombuffer(mapped, dtype=dtype, count=count).view(shape)
