"""What copies of the experts in low precision need (see :mod:`gangline.runtime.mixed`)."""

from collections.abc import Sequence

import torch

from gangline.core.errors import UsageError
from gangline.core.layout import ExpertLayout
from gangline.models import MoEView
from gangline.policies.precision import Mixed, low_precision
from gangline.runtime.files import ALIGN
from gangline.runtime.footprint import Copies
from gangline.runtime.scratch import native_scratch


def precision_of_copies(view: MoEView, high: Sequence[ExpertLayout], mixed: Mixed) -> str:
    """Return the precision that was asked for, or the one that goes with the experts' own."""
    params = sum(block.geometry.expert_params for block in view.blocks)
    return mixed.bits or low_precision(8 * sum(layout.nbytes for layout in high) / params)


def measure_copies(
    view: MoEView,
    high: Sequence[ExpertLayout],
    low: Sequence[ExpertLayout],
    codec: str | None,
    mixed: Mixed,
    dtype: torch.dtype,
) -> tuple[str, Copies]:
    """Return codec and sizes of copies.

    Args:
        view: the MoE layers; their tensors may lie on ``meta``.
        high: how the experts lie.
        low: how their copies will lie, in ``codec``.
        codec: None for experts as they are stored, which are no copies.
        mixed: what the policy wants.
        dtype: the model's number format.

    Raises:
        UsageError: copies are no smaller than the experts.
    """
    if codec is None or any(copy.nbytes >= full.nbytes for copy, full in zip(low, high, strict=True)):
        name = "stored precision" if codec is None else codec
        raise UsageError(
            f"copies in {name} are no smaller than the experts; give the policy's precision lower bits, "
            "or choose one without a second precision"
        )
    return codec, Copies(
        slots=tuple(-(-layout.nbytes // ALIGN) * ALIGN for layout in low),
        share=mixed.share,
        codecs=tuple(sorted({field.codec for layout in low for field in layout.fields})),
        kernel=2 * max(block.geometry.expert_params for block in view.blocks) * dtype.itemsize,
        scratch=native_scratch(view, low),
        rule=mixed.rule,
    )
