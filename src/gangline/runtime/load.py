"""Load a MoE so that its experts never all lie in memory, unless the budget has room for them."""

import gc
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
from gangline.checkpoint.pack import write_pack
from gangline.core.errors import CheckpointError
from gangline.core.home import cache_dir
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout
from gangline.kernels.choice import expert_kernel, set_native_threads
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.reference import ReferenceKernel
from gangline.models import MoEView, check_conformance, expert_math, install
from gangline.policies.caches import CachePolicy
from gangline.policies.compositions import make_precision
from gangline.runtime.arrival import arrive, slot_layout
from gangline.runtime.deferred_imports import deferred_imports
from gangline.runtime.engine import Engine, ExpertKernel
from gangline.runtime.files import IOMode
from gangline.runtime.filling import begin_filling, open_store, wait_for_all
from gangline.runtime.footprint import Copies, Footprint
from gangline.runtime.gpu_experts import GpuExperts, place_experts
from gangline.runtime.mixed import with_copies
from gangline.runtime.native_decode import NativeDecode, enable_native_decode
from gangline.runtime.native_generate import enable_native_generate
from gangline.runtime.opened import OpenedModel, codec_of, open_model
from gangline.runtime.options import LoadOptions, plan_request
from gangline.runtime.planner import MemoryPlan, make_plan, plan_loaded
from gangline.runtime.policy_choice import DEFAULT, PolicyChoice, asked_policy, tuned_policy
from gangline.runtime.policy_setup import live_parts
from gangline.runtime.progress import byte_bar
from gangline.runtime.proofs import Proofs, proof_facts
from gangline.runtime.runtime import Runtime, resident
from gangline.runtime.store import ExpertStore
from gangline.runtime.store_opening import request_all

logger = logging.getLogger(__name__)

# Counts the changes of what the bytes of a pack mean: old ones are then not found, and made anew.
PACK_LAYOUT = 3


def load_model(model: str | Path, **options: Any) -> PreTrainedModel:
    """Return a transformers model that generates as the plain one does, within ``memory``.

    Args:
        model: a folder, a ``.gguf`` file, a Hub id, or ``owner/name:file.gguf``.
        options: the fields of :class:`~gangline.runtime.options.LoadOptions`.

    Raises:
        BudgetError: the budget is too small; the message names the smallest that works.
        CheckpointError, UnsupportedModelError, PackError: the model cannot be read.
        TypeError: there is no such option.
    """
    with deferred_imports():
        return _load(model, LoadOptions(**options))


def _load(model: str | Path, asked: LoadOptions) -> PreTrainedModel:
    policy = asked_policy(asked.policy, asked.predictor, asked.mode)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    set_native_threads(torch.get_num_threads())
    opened, asked, gpu = place_experts(_open(model, asked, need_weights=True), asked)
    plan, _, again = _plan(opened, asked)
    low = low_codec(opened, asked) if plan.low_slots else None
    codec = codec_of(asked.precision)
    catalog = _catalog(opened, codec, asked.progress)
    policy = policy or _tuned(opened, asked, plan) or DEFAULT
    store = None
    if gpu is None:
        store = begin_filling(plan, catalog, opened.view, asked.io, asked.head_start)
    if asked.head_start is not None:
        asked.head_start.close()  # what is not claimed by now never will be
    try:
        loaded, view = opened.load_dense(codec)
        proofs = Proofs(proof_facts(loaded, opened.identity, codec))
        proofs.once("conformance", lambda: check_conformance(view))
        if asked.meanwhile is not None:
            asked.meanwhile()
        if opened.gguf is not None:
            loaded.config.name_or_path = str(opened.gguf.path)
        model_run = run_from_store(
            loaded,
            view,
            plan,
            catalog,
            io=asked.io,
            cache_seed=asked.cache_seed,
            progress=asked.progress,
            policy=policy,
            gpu=None if gpu is None else GpuExperts(gpu, opened.dtype),
            store=store,
            proofs=proofs,
            low=None if low is None else _catalog(opened, low[0], asked.progress),
            again=again if asked.native_only and asked.mode != "execute" else None,
        )
    except BaseException:
        if store is not None:
            store.close()
        raise
    for note in model_run.gangline.plan.notes:  # type: ignore[union-attr]
        logger.warning("%s: %s", opened.name, note)
    model_run.gangline.identity = opened.identity  # type: ignore[union-attr]
    if asked.mode == "execute":
        from gangline.runtime.hash_execution import execute_predictions

        execute_predictions(model_run, policy or DEFAULT)
    if not plan.everything_resident:
        gc.collect()  # soon due after so many new objects: better not in the middle of a token
    return model_run


def _tuned(opened: OpenedModel, asked: LoadOptions, plan: MemoryPlan) -> PolicyChoice | None:
    """Return what ``gangline tune`` found for this model in this memory."""
    if plan.everything_resident or asked.expert_slots is not None or asked.cache_seed is not None:
        return None
    return tuned_policy(opened.identity, plan.precision, plan.budget)


def plan_model(model: str | Path, **options: Any) -> MemoryPlan:
    """Return the plan that :func:`load_model` would follow, from headers alone: no weight is read or
    downloaded.

    Args:
        model: as for :func:`load_model`.
        options: the same as well; those that place no byte (``threads``, ``io``, ...) change nothing.

    Raises:
        BudgetError, CheckpointError, UnsupportedModelError, TypeError: as for :func:`load_model`.
    """
    from gangline.runtime.speed_model import with_speed

    asked = LoadOptions(**options)
    opened, asked, _ = place_experts(_open(model, asked, need_weights=False), asked)
    plan, footprint, _ = _plan(opened, asked)
    return with_speed(plan, footprint)


def _open(model: str | Path, options: LoadOptions, *, need_weights: bool) -> OpenedModel:
    checkpoint = resolve_checkpoint(model, options.revision, need_weights)
    if options.name is not None:
        checkpoint = replace(checkpoint, name=options.name)
    if need_weights and not isinstance(checkpoint, LocalCheckpoint):
        raise CheckpointError(f"{checkpoint.name} is not on this machine; check the network")
    return open_model(checkpoint, options.dtype)


def _plan(
    opened: OpenedModel, options: LoadOptions
) -> tuple[MemoryPlan, Footprint, Callable[[], MemoryPlan]]:
    footprint = opened.footprint(codec_of(options.precision))
    low = low_codec(opened, options)
    if low is not None:
        footprint = replace(footprint, copies=low[1])
    request = plan_request(options, opened.config, model=opened.name)
    notes = opened.source.notes
    plan = make_plan(request, footprint, notes)
    return plan, footprint, lambda: plan_loaded(plan, request, footprint, resident(), notes)


def low_codec(opened: OpenedModel, options: LoadOptions) -> tuple[str, Copies] | None:
    """Return codec and sizes of the copies in low precision that the policy asked for; None if it has none.

    Raises:
        UsageError: there is no such policy, or no lower precision.
    """
    choice = asked_policy(options.policy, options.predictor, options.mode)
    if choice is None or choice.composition.precision is None:
        return None
    return opened.copies(options.precision, make_precision(choice.composition))


def run_from_store(
    model: PreTrainedModel,
    view: MoEView,
    plan: MemoryPlan,
    catalog: ExpertCatalog,
    *,
    io: IOMode = "auto",
    cache_seed: int | None = None,
    progress: bool | None = None,
    policy: PolicyChoice = DEFAULT,
    gpu: GpuExperts | None = None,
    store: ExpertStore | None = None,
    proofs: Proofs | None = None,
    low: ExpertCatalog | None = None,
    again: Callable[[], MemoryPlan] | None = None,
) -> PreTrainedModel:
    """Make a model without expert matrices compute its experts from ``catalog`` within ``plan``, or on a GPU.

    Args:
        model: with its dense weights.
        view: its MoE layers.
        plan: what goes where.
        catalog: where the experts can be read.
        io: how to read them.
        cache_seed: evict at random under this seed.
        progress: show bars; None shows them on a terminal.
        policy: what evicts and prefetches.
        gpu: where all experts shall go, if there.
        store: of this plan and catalog, where one is being filled already.
        proofs: checks that the model passed before.
        low: where the copies in low precision can be read, if the plan has slots for them.
        again: makes the plan that holds once the model is loaded and the native core is to compute it.

    Raises:
        UsageError: the parts of ``policy`` cannot be made; see
            :func:`gangline.runtime.policy_setup.live_parts`.
    """
    parts = live_parts(policy, view, plan, cache_seed)
    stored = catalog if low is None else with_copies(catalog, low)
    kernels = _kernels(stored, view, gpu)

    def bind(layer: int, raws: Sequence[Tensor]) -> Any:
        if gpu is not None:
            return gpu.bind(raws)
        return kernels[layer].bind(arrive(stored.layouts[layer], raws))

    begun = store is not None
    store = store or open_store(plan, stored, parts.caches, io)
    store.bind_with(bind, None if gpu is not None else _forms(stored, kernels))
    engine = Engine(store, kernels, view.geometry)
    runtime = Runtime(model, view, plan, catalog, store, engine, policy)
    for block in view.blocks:
        runtime.on_close(install(block, engine.layer_forward(block.layer)))
    hook = model.register_forward_pre_hook(runtime.before_forward, with_kwargs=True)
    runtime.on_close(hook.remove)
    if plan.rows < plan.context and getattr(model, "generation_config", None) is not None:
        model.generation_config.prefill_chunk_size = plan.rows
    context = None if plan.budget is None else plan.context
    decode = enable_native_decode(model, view, engine, context=context, proofs=proofs)
    if decode is not None:
        _use_natively(runtime, decode, kernels)
        enable_native_generate(model, decode, runtime.before_step)
        if again is not None and decode.serves_prompts and gpu is None and not plan.everything_resident:
            plan = runtime.plan = again()
            parts = live_parts(policy, view, plan, cache_seed)
            _take_torchs_reserve(decode, store, plan, parts.caches)
    object.__setattr__(model, "gangline", runtime)
    if gpu is not None:
        runtime.gpu = gpu
        gpu.fill(store, catalog, view, progress=progress)
        engine.resident = gpu.forward
        return model
    runtime.start_policy(parts)
    if plan.everything_resident:
        if not begun:
            request_all(store, catalog)
        wait_for_all(store, catalog, progress)
        if decode is not None:
            decode.decoder.set_experts(_resident_table(store, kernels, view))
    return model


def _use_natively(runtime: Runtime, decode: NativeDecode, kernels: Sequence[ExpertKernel]) -> None:
    """Let the native step serve further tokens, and prompts where it multiplies packed weights throughout."""
    runtime.on_close(decode.close)
    runtime.decodes_natively = True
    packed = all(isinstance(kernel, NativeKernel) and kernel.packed for kernel in kernels)
    decode.serves_prompts = packed and decode.decoder.rounds_activations


def _kernels(catalog: ExpertCatalog, view: MoEView, gpu: GpuExperts | None) -> list[ExpertKernel]:
    """Return the kernel of every layer, and behind them those of copies, if the catalog has any.

    With all experts on a GPU none of them is ever asked.
    """
    choose = expert_kernel if gpu is None else ReferenceKernel
    return [
        choose(slot_layout(layout), expert_math(view.blocks[number % len(view.blocks)]))
        for number, layout in enumerate(catalog.layouts)
    ]


def _forms(catalog: ExpertCatalog, kernels: Sequence[ExpertKernel]) -> list[ExpertLayout | None]:
    """Return which layers' bound experts look at bytes in the same way, and know nothing else of them."""
    known: dict[ExpertLayout, ExpertLayout] = {}  # equal ones become one, which is soon compared
    return [
        known.setdefault(layout, layout)
        if isinstance(kernel, NativeKernel) and kernel.reusable and slot_layout(layout) == layout
        else None
        for layout, kernel in zip(catalog.layouts, kernels, strict=True)
    ]


def _take_torchs_reserve(
    decode: NativeDecode, store: ExpertStore, plan: MemoryPlan, caches: Sequence[CachePolicy]
) -> None:
    """Give the store the slots of a plan that keeps no memory for torch, which may compute nothing then."""
    decode.alone = True
    store.resize([count for _, count, _ in plan.pools], caches)


def _resident_table(
    store: ExpertStore, kernels: Sequence[ExpertKernel], view: MoEView
) -> list[tuple[Any, list[Any]]] | None:
    """Return the native layer and experts of every MoE layer, or None if one needs torch between products."""
    table = []
    for number, (kernel, layer) in enumerate(zip(kernels, view.geometry.layers, strict=True)):
        if not isinstance(kernel, NativeKernel) or not kernel.fused:
            return None
        keys = (ExpertKey(number, expert) for expert in range(layer.experts))
        table.append((kernel.layer, [kernel.expert(store.bound(key), key.expert) for key in keys]))
    return table


def _catalog(opened: OpenedModel, codec: str | None, progress: bool | None) -> ExpertCatalog:
    """Return where the experts can be read in the form in which they will be computed."""
    in_place = opened.in_place(codec)
    if in_place is not None:
        return in_place
    codec = opened.expert_codec(codec)
    key = hashlib.sha256(f"{opened.identity}|{codec}|{PACK_LAYOUT}".encode()).hexdigest()[:24]
    with byte_bar(f"packing experts of {opened.name} ({codec or 'as stored'})", progress) as update:
        return write_pack(
            opened.source, cache_dir("packs") / key, key=key, codec=codec, origin=opened.name, progress=update
        )
