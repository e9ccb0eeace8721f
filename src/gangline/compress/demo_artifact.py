"""The small file that turns the dense demo model into a MoE: read, write, quantize.

A safetensors file of tensors stacked over layers. Corrections are int8 with one float16 scale per rank.

Shapes: L layers, D hidden, N neurons, G groups, W neurons per group, Q and R ranks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gangline.compress.dense_to_moe import LayerPlan, LowRank
from gangline.core.errors import FormatError

FORMAT = "gangline-demo-1"
ARTIFACT = Path(__file__).with_name("demo_artifact.safetensors")


@dataclass(frozen=True)
class Artifact:
    """Plans of all layers, how many experts a token uses, and the dense file that they belong to."""

    plans: list[LayerPlan]
    top_k: int
    source_sha256: str


def _pack_factor(name: str, factor: Tensor, rank_axis: int) -> dict[str, Tensor]:
    other = -1 if rank_axis == -2 else -2
    scale = factor.abs().amax(other, keepdim=True).clamp_min(1e-8) / 127
    stored = scale.half()
    return {name: (factor / stored.float()).round().clamp(-127, 127).to(torch.int8), f"{name}.scale": stored}


def _pack_low_rank(name: str, parts: Sequence[LowRank]) -> dict[str, Tensor]:
    left, right = torch.stack([one.left for one in parts]), torch.stack([one.right for one in parts])
    # Spread the size of a rank-one term evenly over both factors: float16 scales stay in range.
    size = (right.norm(dim=-1) / left.norm(dim=-2).clamp_min(1e-20)).clamp_min(1e-20).sqrt()
    left, right = left * size[..., None, :], right / size[..., None]
    return _pack_factor(f"{name}.left", left, -1) | _pack_factor(f"{name}.right", right, -2)


def write_artifact(path: Path, artifact: Artifact, neurons: int, notes: dict[str, str]) -> None:
    """Quantize and store; `notes` (where the text came from, ...) go into the file's metadata."""
    plans = artifact.plans
    member_LGN = torch.stack(
        [torch.zeros(len(p.neurons_GW), neurons, dtype=torch.uint8).scatter_(1, p.neurons_GW, 1) for p in plans]
    )
    tensors = {
        "router": torch.stack([plan.router_GD for plan in plans]).bfloat16(),
        "members": torch.from_numpy(np.packbits(member_LGN.numpy(), axis=-1)),
    }
    for name in ("shared", "own"):
        parts = [part for plan in plans if (part := getattr(plan, name)) is not None]
        if parts:
            tensors |= _pack_low_rank(name, parts)
    meta = {"format": FORMAT, "top_k": str(artifact.top_k), "source_sha256": artifact.source_sha256} | notes
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=meta)


def read_artifact(path: Path = ARTIFACT) -> Artifact:
    """Read and de-quantize.

    Raises:
        FormatError: missing, damaged or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: the demo's artifact cannot be read ({error}). Reinstall gangline.") from error
    if meta.get("format") != FORMAT:
        raise FormatError(f"{path}: format {meta.get('format')!r}, this gangline reads {FORMAT!r}. Reinstall gangline.")
    members_LGN = np.unpackbits(tensors["members"].numpy(), axis=-1)
    plans = []
    for index, member_GN in enumerate(members_LGN):
        neurons_GW = torch.from_numpy(np.stack([row.nonzero()[0] for row in member_GN]))
        shared, own = (_low_rank(tensors, name, index) for name in ("shared", "own"))
        plans.append(LayerPlan(tensors["router"][index].float(), neurons_GW, shared, own))
    return Artifact(plans, int(meta["top_k"]), meta["source_sha256"])


def _low_rank(tensors: dict[str, Tensor], name: str, index: int) -> LowRank | None:
    if f"{name}.left" not in tensors:
        return None
    left, right = (
        tensors[f"{name}.{side}"][index].float() * tensors[f"{name}.{side}.scale"][index].float()
        for side in ("left", "right")
    )
    return LowRank(left, right)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
