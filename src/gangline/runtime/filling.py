"""Open the store of a plan, and fill it before the first token where all experts have room."""

from collections.abc import Sequence

import psutil

from gangline.core.layout import ExpertCatalog
from gangline.models import MoEView
from gangline.policies.caches import CachePolicy
from gangline.runtime.arrival import slot_layout
from gangline.runtime.files import IOMode
from gangline.runtime.head_start import HeadStart
from gangline.runtime.planner import MemoryPlan
from gangline.runtime.policy_choice import DEFAULT
from gangline.runtime.policy_setup import live_parts
from gangline.runtime.progress import byte_bar
from gangline.runtime.store import ExpertStore
from gangline.runtime.store_opening import IO_THREADS, Contents, open_contents, request_all


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
    turned = any(slot_layout(layout) != layout for layout in catalog.layouts)
    return open_contents(_contents(plan, catalog, io), caches, binders=IO_THREADS if turned else 0)


def _contents(plan: MemoryPlan, catalog: ExpertCatalog, io: IOMode) -> Contents:
    # Where everything is read once and no budget counts pages, those in the page cache are the quickest.
    return Contents(catalog, plan.pools, io, warm=plan.everything_resident and plan.budget is None)


def begin_filling(
    plan: MemoryPlan,
    catalog: ExpertCatalog,
    view: MoEView,
    io: IOMode,
    head_start: HeadStart | None = None,
) -> ExpertStore | None:
    """Open the store and start reading while other parts of the model are made; None where that must wait.

    Only where all experts have room, no budget was given and the machine has memory for the peak of loading
    the dense weights on top of filled slots. Experts that are turned into tiles as they arrive wait as well:
    that is done as they are bound, and the readers do it side by side. Where ``head_start`` has begun with
    these experts its store is taken, and else it is told of them for the next time.
    """
    if not plan.everything_resident or plan.budget is not None:
        return None
    if any(slot_layout(layout) != layout for layout in catalog.layouts):
        return None
    needed = plan.slot_bytes + plan.dense + plan.load_extra
    taken = 0 if head_start is None else head_start.taken_bytes
    if needed > psutil.virtual_memory().available + taken:
        return None
    contents, caches = _contents(plan, catalog, io), live_parts(DEFAULT, view, plan).caches
    if head_start is not None:
        store = head_start.claim(contents, caches)
        if store is not None:
            return store
        head_start.remember(contents, needed + plan.process)
    store = open_contents(contents, caches)
    request_all(store, catalog)
    return store


def wait_for_all(store: ExpertStore, catalog: ExpertCatalog, progress: bool | None) -> None:
    """Wait until every slot is filled, with a bar; raise the first read error, if any."""
    with byte_bar("reading experts", progress) as update:
        while left := store.under_way:
            update(catalog.nbytes * (len(catalog.extents) - left) // len(catalog.extents), catalog.nbytes)
            store.wait_below(left)
        update(catalog.nbytes, catalog.nbytes)
        store.wait_idle()
