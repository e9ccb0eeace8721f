"""Load a MoE so that its experts never all lie in memory, unless the budget has room for them."""

import hashlib
import logging
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from gangline.checkpoint.locate import LocalCheckpoint, RemoteCheckpoint, resolve_checkpoint
from gangline.checkpoint.pack import write_pack
from gangline.core.errors import CheckpointError, UsageError
from gangline.core.home import cache_dir
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog
from gangline.core.sizes import parse_size
from gangline.core.tiers import Priority
from gangline.kernels.reference import ReferenceKernel
from gangline.models import MoEView, check_conformance, expert_math, install, is_chunk_safe
from gangline.policies.caches import CachePolicy, LayerLRU, RandomEviction
from gangline.runtime.engine import Engine
from gangline.runtime.files import ExpertFiles, IOMode
from gangline.runtime.footprint import text_config
from gangline.runtime.opened import OpenedModel, codec_of, largest_reads, open_model
from gangline.runtime.planner import DEFAULT_CONTEXT, PREFILL_ROWS, MemoryPlan, PlanRequest, make_plan
from gangline.runtime.progress import byte_bar
from gangline.runtime.runtime import Runtime
from gangline.runtime.slots import SlotPool
from gangline.runtime.store import ExpertStore

logger = logging.getLogger(__name__)

IO_THREADS = 4
PACK_LAYOUT = 1


def load_model(
    model: str | Path,
    *,
    memory: str | int | None = None,
    precision: str = "stored",
    ctx_size: int | None = None,
    batch_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    io: IOMode = "auto",
    revision: str | None = None,
    expert_slots: int | None = None,
    cache_seed: int | None = None,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Return a transformers model that generates as the plain one does, within ``memory``.

    Args:
        model: a folder, a ``.gguf`` file, a Hub id, or ``owner/name:file.gguf``.
        memory: peak resident memory of this process (``"6GiB"``); None takes what the machine has free.
        precision: ``stored`` (exact), or ``int8``, ``int4``, ``int4g32`` ...: round the experts to that.
        ctx_size: tokens over all sequences for which keys and values are reserved.
        batch_tokens: rows of one forward pass; ``generate`` feeds a prompt in chunks of this many tokens.
        dtype: number format of the dense weights and of the computation; None keeps the checkpoint's.
        threads: threads that compute; None leaves torch's setting.
        io: how expert files are read: ``direct`` (past the page cache), ``cached``, or ``auto``.
        revision: branch, tag or commit on the Hub.
        expert_slots: this many slots instead of what the budget allows (for tests of exactness).
        cache_seed: evict at random under this seed instead of layer-aware LRU (for the same).
        progress: show bars; None shows them on a terminal.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that works.
        CheckpointError, UnsupportedModelError, PackError: the model cannot be read.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = resolve_checkpoint(model, revision)
    if not isinstance(checkpoint, LocalCheckpoint):
        raise CheckpointError(f"{model} is not on this machine; check the network")
    opened = open_model(checkpoint, dtype)
    codec = codec_of(precision)
    request = plan_request(opened, memory, precision, ctx_size, batch_tokens, expert_slots)
    plan = make_plan(request, opened.footprint(codec), opened.source.notes)
    for note in plan.notes:
        logger.warning("%s: %s", opened.name, note)
    catalog = _catalog(opened, codec, progress)
    loaded, view = opened.load_dense()
    check_conformance(view)
    if opened.gguf is not None:
        loaded.config.name_or_path = str(opened.gguf.path)
    return run_from_store(loaded, view, plan, catalog, io=io, cache_seed=cache_seed, progress=progress)


def plan_model(
    model: str | Path,
    *,
    memory: str | int | None = None,
    precision: str = "stored",
    ctx_size: int | None = None,
    batch_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> MemoryPlan:
    """Return the plan that :func:`load_model` would follow, from headers alone: no weight is read or
    downloaded.

    Raises:
        BudgetError, CheckpointError, UnsupportedModelError: as for :func:`load_model`.
    """
    from gangline.runtime.speed_model import with_speed

    checkpoint: LocalCheckpoint | RemoteCheckpoint = resolve_checkpoint(model, revision, need_weights=False)
    opened = open_model(checkpoint, dtype)
    footprint = opened.footprint(codec_of(precision))
    request = plan_request(opened, memory, precision, ctx_size, batch_tokens, None)
    return with_speed(make_plan(request, footprint, opened.source.notes), footprint)


def plan_request(
    opened: OpenedModel,
    memory: str | int | None,
    precision: str,
    ctx_size: int | None,
    batch_tokens: int | None,
    expert_slots: int | None,
) -> PlanRequest:
    """Fill in what the user left open."""
    config = text_config(opened.config)
    longest = int(getattr(config, "max_position_embeddings", 0) or 0)
    context = ctx_size or (min(longest, DEFAULT_CONTEXT) if longest else DEFAULT_CONTEXT)
    return PlanRequest(
        model=opened.name,
        budget=None if memory is None else parse_size(memory),
        precision=precision,
        context=context,
        rows=prefill_rows(opened.config, context, batch_tokens),
        process=int(psutil.Process().memory_info().rss),
        available=int(psutil.virtual_memory().available * 0.9),
        expert_slots=expert_slots,
    )


def prefill_rows(config: PreTrainedConfig, context: int, batch_tokens: int | None) -> int:
    """Return how many tokens of a prompt are computed at once.

    Raises:
        UsageError: chunks are asked for of a family that transformers does not compute right in chunks.
    """
    if is_chunk_safe(config):
        return min(batch_tokens or PREFILL_ROWS, context)
    if batch_tokens is not None and batch_tokens < context:
        raise UsageError(
            f"transformers does not compute {config.model_type} right in chunks of a prompt; "
            f"leave batch_tokens out, or set ctx_size to at most {batch_tokens}"
        )
    return context


def run_from_store(
    model: PreTrainedModel,
    view: MoEView,
    plan: MemoryPlan,
    catalog: ExpertCatalog,
    *,
    io: IOMode = "auto",
    cache_seed: int | None = None,
    progress: bool | None = None,
) -> PreTrainedModel:
    """Make a model without expert matrices compute its experts from ``catalog`` within ``plan``."""
    kernels = [
        ReferenceKernel(layout, expert_math(block))
        for layout, block in zip(catalog.layouts, view.blocks, strict=True)
    ]
    files = ExpertFiles(catalog.files, io)
    pools, pool_of_layer = _pools(plan, catalog, view, files.align, cache_seed)
    store = ExpertStore(
        catalog, files, pools, pool_of_layer, lambda layer, raws: kernels[layer].bind(raws), IO_THREADS
    )
    engine = Engine(store, kernels, view.geometry)
    runtime = Runtime(model, view, plan, catalog, store, engine)
    for block in view.blocks:
        runtime.on_close(install(block, engine.layer_forward(block.layer)))
    hook = model.register_forward_pre_hook(runtime.before_forward, with_kwargs=True)
    runtime.on_close(hook.remove)
    if plan.rows < plan.context and getattr(model, "generation_config", None) is not None:
        model.generation_config.prefill_chunk_size = plan.rows
    object.__setattr__(model, "gangline", runtime)
    if plan.everything_resident:
        _read_everything(store, catalog, progress)
    return model


def _catalog(opened: OpenedModel, codec: str | None, progress: bool | None) -> ExpertCatalog:
    """Return where the experts can be read in the form in which they will be computed."""
    in_place = opened.in_place(codec)
    if in_place is not None:
        return in_place
    key = hashlib.sha256(f"{opened.identity}|{codec}|{PACK_LAYOUT}".encode()).hexdigest()[:24]
    with byte_bar(f"packing experts of {opened.name} ({codec or 'as stored'})", progress) as update:
        return write_pack(
            opened.source, cache_dir("packs") / key, key=key, codec=codec, origin=opened.name, progress=update
        )


def _pools(
    plan: MemoryPlan, catalog: ExpertCatalog, view: MoEView, align: int, cache_seed: int | None
) -> tuple[list[SlotPool], list[int]]:
    needed = largest_reads(catalog, align)
    pool_of_layer = [0] * len(needed)
    pools: list[SlotPool] = []
    for size, count, layers in plan.slots:
        mine = set(layers)
        for layer in layers:
            pool_of_layer[layer] = len(pools)
        top_k = [g.top_k if n in mine else 0 for n, g in enumerate(view.geometry.layers)]
        experts = [g.experts if n in mine else 0 for n, g in enumerate(view.geometry.layers)]
        policy: CachePolicy = (
            LayerLRU(count, top_k, experts) if cache_seed is None else RandomEviction(cache_seed)
        )
        assert max(needed[layer] for layer in layers) <= size
        pools.append(SlotPool(size, count, policy))
    return pools, pool_of_layer


def _read_everything(store: ExpertStore, catalog: ExpertCatalog, progress: bool | None) -> None:
    """Fill all slots before the first token, with a bar."""
    with byte_bar("reading experts", progress) as update:
        done = 0
        for key, extents in catalog.extents.items():
            store.request(ExpertKey(*key), Priority.BACKGROUND)
            done += sum(extent.nbytes for extent in extents)
            store.wait_below(2 * IO_THREADS)
            update(done, catalog.nbytes)
        store.wait_idle()
