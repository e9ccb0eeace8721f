"""Take over the experts of a model that is already built, and give them back."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gangline.checkpoint.pack import open_pack, write_pack
from gangline.checkpoint.recode import recode_layout
from gangline.core.errors import UsageError
from gangline.core.home import cache_dir
from gangline.core.layout import ExpertCatalog, ExpertLayout
from gangline.formats import get_codec
from gangline.models import (
    MoEBlock,
    MoEView,
    check_conformance,
    drop_expert_params,
    expert_tensors,
    find_moe,
    restore_expert_params,
    stored_fields,
)
from gangline.policies.compositions import make_precision
from gangline.runtime.arrival import slot_layout
from gangline.runtime.copies import measure_copies, precision_of_copies
from gangline.runtime.files import ALIGN
from gangline.runtime.footprint import Copies, Footprint, measure_footprint
from gangline.runtime.load import run_from_store
from gangline.runtime.opened import codec_of, largest_reads
from gangline.runtime.options import LoadOptions, plan_request
from gangline.runtime.planner import DEFAULT_CONTEXT, make_plan
from gangline.runtime.policy_choice import DEFAULT, PolicyChoice, asked_policy
from gangline.runtime.runtime import Runtime
from gangline.runtime.scratch import native_scratch


class ModuleSource:
    """The experts of a built model as an ``ExpertSource``."""

    catalog = None
    notes = ()

    def __init__(self, view: MoEView, dtype: torch.dtype) -> None:
        self._blocks = view.blocks
        self.layouts: tuple[ExpertLayout, ...] = tuple(stored_fields(block, dtype) for block in view.blocks)
        self.experts: tuple[int, ...] = tuple(block.geometry.experts for block in view.blocks)

    def read_layer(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield the matrices of one layer's experts as bytes."""
        block = self._blocks[layer]
        for expert in range(block.geometry.experts):
            tensors = expert_tensors(block, expert)
            yield expert, tuple(t.detach().contiguous().view(torch.uint8).reshape(-1) for t in tensors)


def attach_model(model: PreTrainedModel, *, check: bool = True, **options: Any) -> Runtime:
    """Move a model's experts into a temporary pack on disk and a store within ``memory``; returns its
    runtime.

    The model has been in memory as a whole before, so the budget holds from here on. :func:`detach_model` (or
    leaving ``with attach(model):``) gives the model its experts back.

    Args:
        model: a transformers MoE on the CPU.
        check: prove first that our view of its routers and experts reproduces the model (a few rows per
            layer).
        options: the fields of :class:`~gangline.runtime.options.LoadOptions` that say where experts lie:
            ``memory``, ``precision``, ``ctx_size``, ``batch_tokens``, ``expert_slots``, ``cache_seed``,
            ``policy``, ``predictor``, ``mode``, ``io``, ``threads``.

    Raises:
        ConformanceError, UnsupportedModelError: the model is not understood.
        BudgetError: the budget is too small.
        UsageError: the model is attached already, or an option is about reading a checkpoint or a GPU.
        TypeError: there is no such option.
    """
    asked = LoadOptions(**{"progress": False, **options})
    _refuse_unfit(asked)
    policy = asked_policy(asked.policy, asked.predictor, asked.mode) or DEFAULT
    if getattr(model, "gangline", None) is not None:
        raise UsageError("this model is attached already; call gangline.detach(model) first")
    view = find_moe(model)
    if check:
        check_conformance(view)
    dtype = next(iter(expert_tensors(view.blocks[0], 0))).dtype
    codec = codec_of(asked.precision)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    source = ModuleSource(view, dtype)
    folder = Path(tempfile.mkdtemp(prefix="attached-", dir=cache_dir("attached")))
    dropped: list[MoEBlock] = []
    try:
        stored = write_pack(source, folder / "stored", key="stored")
        catalog = stored if codec is None else write_pack(source, folder / codec, key=codec, codec=codec)
        low = _copies(model, view, source, catalog, policy)
        copies = None if low is None else write_pack(source, folder / "low", key=low[0], codec=low[0])
        for block in view.blocks:
            drop_expert_params(block)
            dropped.append(block)
        footprint = replace(_footprint(model, view, catalog), copies=None if low is None else low[1])
        request = plan_request(
            asked,
            model.config,
            model=asked.name or type(model).__name__,
            context=DEFAULT_CONTEXT,
            held=footprint.dense,
        )
        plan = make_plan(request, footprint)
        run_from_store(
            model,
            view,
            plan,
            catalog,
            io=asked.io,
            cache_seed=asked.cache_seed,
            progress=asked.progress,
            policy=policy,
            low=copies if plan.low_slots else None,
        )
    except BaseException:
        _restore(dropped, folder, dtype)
        raise
    runtime = model.__dict__["gangline"]
    assert isinstance(runtime, Runtime)
    runtime.attached = True
    runtime.on_close(lambda: _restore(dropped, folder, dtype))
    if asked.mode == "execute":
        from gangline.runtime.hash_execution import execute_predictions

        execute_predictions(model, policy)
    return runtime


def _refuse_unfit(asked: LoadOptions) -> None:
    """Refuse options that mean nothing for a model that has been built."""
    if asked.dtype is not None or asked.revision is not None:
        raise UsageError("a built model has its dtype and revision; convert it before gangline.attach")
    if asked.device not in (None, "cpu"):
        raise UsageError("experts of a built model stay on the processor; only gangline.load takes a device")
    if asked.native_only:
        raise UsageError(
            "who has built a model may ask it for anything; only gangline.load takes native_only"
        )


def _copies(
    model: PreTrainedModel, view: MoEView, source: ModuleSource, catalog: ExpertCatalog, policy: PolicyChoice
) -> tuple[str, Copies] | None:
    """Return codec and sizes of copies in low precision, if the policy has any."""
    if policy.composition.precision is None:
        return None
    mixed = make_precision(policy.composition)
    codec = codec_of(precision_of_copies(view, catalog.layouts, mixed))
    low = [recode_layout(layout, codec) for layout in source.layouts]
    return measure_copies(view, catalog.layouts, low, codec, mixed, model.dtype)


def _footprint(model: PreTrainedModel, view: MoEView, catalog: ExpertCatalog) -> Footprint:
    layouts = tuple(slot_layout(layout) for layout in catalog.layouts)
    return measure_footprint(
        model,
        model.dtype,
        view.geometry,
        layouts,
        tuple(largest_reads(catalog, ALIGN)),
        loaded=True,
        scratch=native_scratch(view, layouts),
    )


def detach_model(model: PreTrainedModel) -> None:
    """Give a model its experts back and forget its runtime.

    Raises:
        UsageError: the model was not attached (a model from ``load`` never had its experts in memory).
    """
    runtime = getattr(model, "gangline", None)
    if runtime is None or not runtime.attached:
        raise UsageError("this model was not attached; only gangline.attach can be undone by detach")
    runtime.close()


def _restore(dropped: list[MoEBlock], folder: Path, dtype: torch.dtype) -> None:
    """Put the exact tensors back from the pack and remove it."""
    for block in dropped:
        restore_expert_params(block, _read_experts(folder / "stored", block.layer, dtype))
    shutil.rmtree(folder, ignore_errors=True)


def _read_experts(folder: Path, layer: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Yield the matrices of one layer of a pack with dense codecs, expert by expert, as stored."""
    catalog: ExpertCatalog = open_pack(folder)
    keys = sorted(key for key in catalog.extents if key.layer == layer)
    for key in keys:
        tensors = []
        for spec, extent in zip(catalog.layouts[layer].fields, catalog.extents[key], strict=True):
            with catalog.files[extent.file].open("rb") as file:
                file.seek(extent.offset)
                raw = torch.frombuffer(bytearray(file.read(extent.nbytes)), dtype=torch.uint8)
            tensors.append(get_codec(spec.codec).decode(raw, spec.shape, dtype))
        yield tuple(tensors)
