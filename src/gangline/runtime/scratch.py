"""What the kernels of the experts keep in memory besides the weights, for chunks of so many rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gangline.core.layout import ExpertLayout
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.models import MoEView, expert_math
from gangline.runtime.event_rules import RUN_PAIRS_PER_ROW

Scratch = Callable[[int], int]
"""Maps the rows of a chunk to bytes."""


def native_scratch(view: MoEView, layouts: Sequence[ExpertLayout]) -> Scratch | None:
    """Return what the native core keeps, or None where a layer's experts are computed by torch, wholly or in
    steps.

    Args:
        view: the MoE layers; their tensors may lie on ``meta``.
        layouts: how the experts of each layer lie in their slots.
    """
    kernels: dict[tuple[ExpertLayout, int], NativeKernel] = {}
    for block, layout in zip(view.blocks, layouts, strict=True):
        known = (layout, block.geometry.top_k)
        if known in kernels:
            continue
        unbiased = replace(expert_math(block), gate_up_bias_EG=None, down_bias_ED=None)
        if NativeKernel.supports(layout, unbiased) is not None:
            return None
        kernels[known] = NativeKernel(layout, unbiased)
        if not kernels[known].packed:
            return None

    def of_rows(rows: int) -> int:
        # A run of experts has no more pairs than this, and one token's experts are computed together.
        return max(
            kernel.scratch_bytes(rows, max(RUN_PAIRS_PER_ROW * rows, k)) for (_, k), kernel in kernels.items()
        )

    return of_rows
