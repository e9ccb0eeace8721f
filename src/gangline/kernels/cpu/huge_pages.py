"""Memory in huge pages: what is read from end to end for every token then misses the TLB rarely.

Linux gives huge pages to private anonymous mappings that ask for them. Memory of ``malloc``, and of
``mmap.mmap(-1, n)`` as Python maps it by default (shared), stays in pages of 4 KiB on most machines.

A page that nobody has used lately must be found and zeroed, on a virtual machine perhaps by the host. What
every prompt needs anew is therefore kept for the next one (``recycled``).
"""

import math
import mmap
import weakref
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HUGE_PAGE = 2 << 20
KEPT = 256 << 20
"""Bytes of mappings that are kept for the next who asks for as many."""

_kept: list[mmap.mmap] = []


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


def empty(shape: tuple[int, ...], dtype: "torch.dtype", *, recycled: bool = False) -> "Tensor":
    """Return a tensor on the CPU as ``torch.empty`` does, in huge pages if it is as large as one.

    Args:
        shape, dtype: of the tensor.
        recycled: whether its memory may come from, and is left to, another such tensor of the same size. Not
            where a budget counts every byte: what is kept belongs to nobody.

    Raises:
        OSError: there is no address space left.
    """
    import torch  # the other function is wanted before torch is there

    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    mapped = (_take(nbytes) if recycled else None) or map_anonymous(nbytes)
    whole = np.frombuffer(mapped, dtype=np.uint8)  # lives as long as a tensor does that looks at it
    if recycled:
        weakref.finalize(whole, _keep, mapped).atexit = False
    return torch.from_numpy(whole[:nbytes]).view(dtype).view(shape)


def _take(nbytes: int) -> mmap.mmap | None:
    """Return a kept mapping of that size."""
    length = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    for index, mapped in enumerate(_kept):
        if len(mapped) == length:
            return _kept.pop(index)
    return None


def _keep(mapped: mmap.mmap) -> None:
    """Keep a mapping, and let the oldest go where there are too many."""
    _kept.append(mapped)
    while sum(len(one) for one in _kept) > KEPT:
        _kept.pop(0)
