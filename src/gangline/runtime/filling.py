"""Open the store of a plan, and fill it before the first token where all experts have room."""

from collections.abc import Sequence

import psutil

from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.core.tiers import Priority
from gangline.models import MoEView
from gangline.policies.caches import CachePolicy
from gangline.runtime.arrival import slot_layout
from gangline.runtime.files import ExpertFiles, IOMode
from gangline.runtime.opened import read_sizes
from gangline.runtime.planner import MemoryPlan
from gangline.runtime.policy_choice import DEFAULT
from gangline.runtime.policy_setup import live_parts
from gangline.runtime.progress import byte_bar
from gangline.runtime.slots import SlotPool
from gangline.runtime.store import ExpertStore

IO_THREADS = 4


def open_store(
    plan: MemoryPlan, catalog: ExpertCatalog, caches: Sequence[CachePolicy], io: IOMode
) -> ExpertStore:
    """Return a store with the slots of a plan; it gets its kernels by ``bind_with``.

    Args:
        plan: its slots.
        catalog: where the experts are.
        caches: one policy for each kind of slot of the plan.
        io: how to read.
    """
    # Where everything is read once and no budget counts pages, those in the page cache are the quickest.
    warm = plan.everything_resident and plan.budget is None
    files = ExpertFiles(catalog.files, io, warm=warm)
    pools, pool_of_layer = _pools(plan, catalog, files.align, caches)
    turned = any(slot_layout(layout) != layout for layout in catalog.layouts)
    return ExpertStore(catalog, files, pools, pool_of_layer, None, IO_THREADS, IO_THREADS if turned else 0)


def begin_filling(plan: MemoryPlan, catalog: ExpertCatalog, view: MoEView, io: IOMode) -> ExpertStore | None:
    """Open the store and start reading while other parts of the model are made; None where that must wait.

    Only where all experts have room, no budget was given and the machine has memory for the peak of loading
    the dense weights on top of filled slots. Experts that are turned into tiles as they arrive wait as well:
    that is done as they are bound, and the readers do it side by side.
    """
    if not plan.everything_resident or plan.budget is not None:
        return None
    if any(slot_layout(layout) != layout for layout in catalog.layouts):
        return None
    if plan.slot_bytes + plan.dense + plan.load_extra > psutil.virtual_memory().available:
        return None
    store = open_store(plan, catalog, live_parts(DEFAULT, view, plan).caches, io)
    request_all(store, catalog)
    return store


def request_all(store: ExpertStore, catalog: ExpertCatalog) -> None:
    """Ask for every expert, in the order in which the layers come."""
    for key in catalog.extents:
        store.request(ExpertKey(*key), Priority.BACKGROUND)


def wait_for_all(store: ExpertStore, catalog: ExpertCatalog, progress: bool | None) -> None:
    """Wait until every slot is filled, with a bar; raise the first read error, if any."""
    with byte_bar("reading experts", progress) as update:
        while left := store.under_way:
            update(catalog.nbytes * (len(catalog.extents) - left) // len(catalog.extents), catalog.nbytes)
            store.wait_below(left)
        update(catalog.nbytes, catalog.nbytes)
        store.wait_idle()


def _pools(
    plan: MemoryPlan, catalog: ExpertCatalog, align: int, policies: Sequence[CachePolicy]
) -> tuple[list[SlotPool], list[int]]:
    needed = read_sizes(catalog, align)
    pool_of_layer = [0] * len(needed)
    pools: list[SlotPool] = []
    for (size, count, layers), policy in zip(plan.pools, policies, strict=True):
        for layer in layers:
            pool_of_layer[layer] = len(pools)
        assert max(needed[layer] for layer in layers) <= size
        pools.append(SlotPool(size, count, policy))
    return pools, pool_of_layer
