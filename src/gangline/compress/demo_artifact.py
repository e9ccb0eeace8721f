"""The small file that turns the dense demo model into a MoE: read, write, quantize.

A safetensors file of tensors stacked over layers. Corrections are int4 with one float16 scale per rank.

Shapes: L layers, D hidden, N neurons, G groups, W neurons per group, R a rank, X either side of a correction.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gangline.compress.demo_files import ARTIFACT, FORMAT
from gangline.compress.dense_to_moe import LayerPlan, LowRank
from gangline.compress.dense_to_moe.rounding import best_scale, codes
from gangline.core.errors import FormatError


@dataclass(frozen=True)
class Artifact:
    """Plans of all layers, how many experts a token uses, and the dense file that they belong to."""

    plans: list[LayerPlan]
    top_k: int
    source_sha256: str


def _quantize(factor_RX: Tensor) -> tuple[Tensor, Tensor]:
    """Int4 codes uint8 [..., R, X / 2], low nibble first, and float16 scales [..., R, 1] of least error."""
    scale = best_scale(factor_RX)
    stored = (codes(factor_RX, scale) + 8).to(torch.uint8)
    return stored[..., 0::2] | (stored[..., 1::2] << 4), scale.half()


def _dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return (codes.float() - 8) * scale.float()


def _pack_low_rank(name: str, correction: LowRank) -> dict[str, Tensor]:
    # Spread the size of every rank-one term evenly over both factors: float16 scales stay in range.
    left, right = correction.left.transpose(-1, -2), correction.right
    size = (
        (right.norm(dim=-1, keepdim=True) / left.norm(dim=-1, keepdim=True).clamp_min(1e-20))
        .clamp_min(1e-12)
        .sqrt()
    )
    packed = {}
    for side, factor in (("left", left * size), ("right", right / size)):
        packed[f"{name}.{side}"], packed[f"{name}.{side}.scale"] = _quantize(factor)
    return packed


def _unpack_low_rank(tensors: dict[str, Tensor], name: str) -> LowRank | None:
    if f"{name}.left" not in tensors:
        return None
    left, right = (
        _dequantize(tensors[f"{name}.{s}"], tensors[f"{name}.{s}.scale"]) for s in ("left", "right")
    )
    return LowRank(left.transpose(-1, -2), right)


def pack_plan(plan: LayerPlan, neurons: int) -> dict[str, Tensor]:
    """The stored tensors of one layer."""
    member_GN = torch.zeros(len(plan.neurons_GW), neurons, dtype=torch.uint8).scatter_(1, plan.neurons_GW, 1)
    tensors = {
        "router": plan.router_GD.bfloat16(),
        "members": torch.from_numpy(np.packbits(member_GN.numpy(), axis=-1)),
    }
    for name in ("shared", "own"):
        correction: LowRank | None = getattr(plan, name)
        if correction is not None:
            tensors |= _pack_low_rank(name, correction)
    return tensors


def unpack_plan(tensors: dict[str, Tensor]) -> LayerPlan:
    """The plan that one layer's stored tensors mean."""
    neurons_GW = np.stack([row.nonzero()[0] for row in np.unpackbits(tensors["members"].numpy(), axis=-1)])
    shared, own = (_unpack_low_rank(tensors, name) for name in ("shared", "own"))
    return LayerPlan(tensors["router"].float(), torch.from_numpy(neurons_GW), shared, own)


def write_artifact(path: Path, artifact: Artifact, neurons: int, notes: dict[str, str]) -> None:
    """Quantize and store; `notes` (where the text came from, ...) go into the file's metadata."""
    layers = [pack_plan(plan, neurons) for plan in artifact.plans]
    tensors = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    meta = {"format": FORMAT, "top_k": str(artifact.top_k), "source_sha256": artifact.source_sha256} | notes
    save_file(tensors, path, metadata=meta)


def read_artifact(path: Path = ARTIFACT) -> Artifact:
    """Read and de-quantize.

    Raises:
        FormatError: missing, damaged or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - not a dict, has no iterator
            }
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path}: the demo's artifact cannot be read ({error}). Reinstall gangline."
        ) from error
    if meta.get("format") != FORMAT:
        raise FormatError(
            f"{path}: format {meta.get('format')!r}, this gangline reads {FORMAT!r}. Reinstall gangline."
        )
    layers = len(tensors["router"])
    plans = [
        unpack_plan({name: stacked[index] for name, stacked in tensors.items()}) for index in range(layers)
    ]
    return Artifact(plans, int(meta["top_k"]), meta["source_sha256"])
