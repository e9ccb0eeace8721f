"""Experts that all lie on one GPU for good, while the rest of the model stays on the processor.

Sparse experts (``samoyeds:`` codecs) are the ones that GPU kernels read. They are read once, through the
store's slots, and copied; a layer then sends its rows there and gets their weighted sums back.

Shape suffixes: T tokens, K chosen experts per token, D hidden.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gangline.core.errors import UsageError
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout
from gangline.core.tiers import Priority
from gangline.kernels.cuda.choice import SamoyedsLayer
from gangline.kernels.cuda.errors import CudaKernelError
from gangline.kernels.cuda.gpu import Gpu, gpu_missing, open_gpu
from gangline.kernels.reference import ExpertMath
from gangline.models import MoEView, expert_math
from gangline.runtime.opened import OpenedModel, codec_of
from gangline.runtime.options import LoadOptions
from gangline.runtime.progress import byte_bar
from gangline.runtime.store import ExpertStore

_log = logging.getLogger(__name__)
_DEVICE = re.compile(r"cuda(:\d+)?")
# Slots on the processor that bytes pass through on their way.
STAGING_SLOTS = 8


class GpuExperts:
    """Computes every MoE layer on one GPU; the experts are bound once by :meth:`fill`.

    Attributes:
        gpu: where they lie.
    """

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        """Args: ``dtype`` is the number format in which layers are computed; kernels take bf16."""
        self.gpu = gpu
        self._dtype = dtype
        self._layers: list[SamoyedsLayer] = []

    def bind(self, raws: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy one expert's bytes to the GPU; its slot may be overwritten afterwards."""
        copies = tuple(raw.to(self.gpu.device, copy=True) for raw in raws)
        if self.gpu.device.type == "cuda":
            torch.cuda.current_stream(self.gpu.device).synchronize()  # this is a thread that reads
        return copies

    def fill(
        self, store: ExpertStore, catalog: ExpertCatalog, view: MoEView, *, progress: bool | None = None
    ) -> None:
        """Read all experts through ``store``, whose ``bind`` must be ours.

        Raises:
            PackError: an expert cannot be read.
        """
        with byte_bar(f"copying experts to {self.gpu.name}", progress) as update:
            done = 0
            for layer, block in enumerate(view.blocks):
                raws = []
                for expert in range(block.geometry.experts):
                    key = ExpertKey(layer, expert)
                    store.request(key, Priority.BACKGROUND)
                    store.wait_idle()
                    raws.append(store.bound(key))
                    done += sum(extent.nbytes for extent in catalog.extents[key])
                    update(done, catalog.nbytes)
                layout, math = catalog.layouts[layer], expert_math(block)
                self._layers.append(SamoyedsLayer(layout, math, raws, launcher=self.gpu.launcher))

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return ``[T, D]`` where ``x_TD`` lies and in its dtype; the layer runs in the model's dtype."""
        there = self.gpu.device
        y_TD = self._layers[layer](
            x_TD.to(there, self._dtype), ids_TK.to(there), weights_TK.to(there, torch.float32)
        )
        return y_TD.to(x_TD.device, x_TD.dtype)


def place_experts(opened: OpenedModel, options: LoadOptions) -> tuple[OpenedModel, LoadOptions, Gpu | None]:
    """Decide where the experts of a model are computed.

    ``device="cuda"`` asks for a GPU. Without a word, one is taken only where it can serve every layer and has
    timed such experts; else nothing changes.

    Returns:
        The model and options to go on with, and the GPU; None where the processor computes.

    Raises:
        UsageError: a GPU is asked for and cannot serve; says why.
    """
    asked = options.device
    if asked == "cpu" or (asked is None and not _may_try(opened, options)):
        return opened, options, None
    if asked is not None and _DEVICE.fullmatch(asked) is None:
        raise UsageError(f"{asked!r} is no device; choose cpu, cuda, or for example cuda:1")
    gpu, reason = _gpu_for(opened, options, asked or "cuda")
    if gpu is not None and asked is None:
        reason = reason or gpu.unmeasured(opened.source.layouts)
    if reason is None and gpu is not None:
        staged = replace(options, expert_slots=STAGING_SLOTS)
        return replace(opened, sparse_as_stored=True), staged, gpu
    if asked is not None:
        raise UsageError(f"{opened.name}: experts cannot be computed on {asked}: {reason}; use --device cpu")
    _log.info("%s: experts are computed on the processor: %s", opened.name, reason)
    return opened, options, None


def _may_try(opened: OpenedModel, options: LoadOptions) -> bool:
    """Whether a GPU may be taken unasked: there is one, and nothing was said about slots or precision."""
    sparse = any(field.codec.startswith("samoyeds:") for field in opened.source.layouts[0].fields)
    untouched = options.expert_slots is None and options.cache_seed is None and options.precision == "stored"
    return sparse and untouched and gpu_missing() is None


def _gpu_for(opened: OpenedModel, options: LoadOptions, device: str) -> tuple[Gpu | None, str | None]:
    if codec_of(options.precision) is not None:
        return None, f"--precision {options.precision} has no GPU kernel"
    if options.expert_slots is not None or options.cache_seed is not None:
        return None, "slots and evictions are those of the processor"
    missing = gpu_missing()
    if missing is not None:
        return None, missing
    try:
        gpu = open_gpu(device)
    except (CudaKernelError, RuntimeError, AssertionError) as error:
        # torch has errors of three kinds for a GPU that is not there.
        return None, str(error)
    layouts: Sequence[ExpertLayout] = opened.source.layouts
    maths: list[ExpertMath] = [expert_math(block) for block in opened.view.blocks]
    nbytes = sum(
        layout.nbytes * block.geometry.experts
        for layout, block in zip(layouts, opened.view.blocks, strict=True)
    )
    return gpu, gpu.refuses(layouts, maths, nbytes)
