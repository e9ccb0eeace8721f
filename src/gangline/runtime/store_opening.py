"""Open an expert store from what was planned, without torch: reading may begin before that is imported."""

from collections.abc import Sequence
from dataclasses import dataclass

from gangline.core.errors import StoreError
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.core.tiers import Priority
from gangline.policies.caches import CachePolicy
from gangline.runtime.files import ExpertFiles, IOMode
from gangline.runtime.read_plan import read_sizes
from gangline.runtime.slots import SlotPool
from gangline.runtime.store import ExpertStore

IO_THREADS = 4

Pools = tuple[tuple[int, int, tuple[int, ...]], ...]
"""For every slot size ``(slot bytes, count, layers)``."""


@dataclass(frozen=True)
class Contents:
    """What decides which bytes lie where in a store.

    Attributes:
        catalog: where the experts are.
        pools: the slots.
        io: how to read.
        warm: whether pages that the page cache holds are taken from there (see :class:`ExpertFiles`).
    """

    catalog: ExpertCatalog
    pools: Pools
    io: IOMode
    warm: bool


def open_contents(
    contents: Contents, caches: Sequence[CachePolicy], threads: int = IO_THREADS, binders: int = 0
) -> ExpertStore:
    """Return an empty store; it gets its kernels by ``bind_with``.

    Args:
        contents: what it is for.
        caches: one policy for each kind of slot.
        threads: that read. binders: that bind what has arrived, where that takes time.

    Raises:
        BudgetError: the slots cannot be mapped.
        StoreError: an expert is larger than its slot.
        CheckpointError, UsageError: as for :class:`ExpertFiles`.
    """
    files = ExpertFiles(contents.catalog.files, contents.io, warm=contents.warm)
    try:
        pools, pool_of_layer = _pools(contents, files.align, caches)
    except BaseException:
        files.close()
        raise
    return ExpertStore(contents.catalog, files, pools, pool_of_layer, None, threads, binders)


def request_all(store: ExpertStore, catalog: ExpertCatalog) -> None:
    """Ask for every expert, in the order in which the layers come."""
    for key in catalog.extents:
        store.request(ExpertKey(*key), Priority.BACKGROUND)


def _pools(
    contents: Contents, align: int, policies: Sequence[CachePolicy]
) -> tuple[list[SlotPool], list[int]]:
    needed = read_sizes(contents.catalog, align)
    pool_of_layer = [0] * len(needed)
    pools: list[SlotPool] = []
    for (size, count, layers), policy in zip(contents.pools, policies, strict=True):
        for layer in layers:
            pool_of_layer[layer] = len(pools)
        if (largest := max(needed[layer] for layer in layers)) > size:
            raise StoreError(f"slots of {size} bytes do not hold experts of {largest}; plan the model again")
        pools.append(SlotPool(size, count, policy))
    return pools, pool_of_layer
