"""Experts that a checkpoint holds in one of our own codecs: what ``gangline sparsify`` writes.

``config.json`` then has ``"quantization_config": {"quant_method": "gangline", "version": 1}``, so that no
other loader takes the bytes for weights. Every matrix is one tensor of bytes (U8, one dimension) that names
its own codec::

    {experts module}.{expert}.{field}.{codec}    model.layers.3.mlp.experts.7.down.samoyeds:1:2:32/bf16

with the fields ``gate_up``, or ``gate`` and ``up``, or ``up`` alone; and ``down``. Matrices are always laid
``(out, in)``. All experts of a layer have the same fields and codecs. Everything else is stored as usual.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gangline.checkpoint.inplace import FieldPlan
from gangline.checkpoint.safetensors_header import TensorEntry
from gangline.checkpoint.source import ExpertsModule
from gangline.core.errors import CheckpointError, FormatError
from gangline.core.layout import Extent, FieldSpec
from gangline.formats import get_codec

METHOD = "gangline"
VERSION = 1


def quantization_entry() -> dict[str, Any]:
    """What ``config.json`` says of such a checkpoint."""
    return {"quant_method": METHOD, "version": VERSION}


def packed_name(prefix: str, expert: int, field: str, codec: str) -> str:
    """Name of one matrix's tensor; ``prefix`` is the path of the experts module."""
    return f"{prefix}.{expert}.{field}.{codec}"


def is_packed(folder: Path) -> bool:
    """Whether the ``config.json`` of a checkpoint has our entry; False where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def plan_packed_layer(
    tensors: Mapping[str, TensorEntry], module: ExpertsModule
) -> tuple[FieldPlan, ...] | None:
    """Byte ranges of a layer's experts, or None if the checkpoint does not hold them packed.

    Raises:
        CheckpointError: a matrix is missing, or its bytes are not those of its codec.
    """
    codecs = _codecs(tensors, f"{module.prefix}.0.")
    if "down" not in codecs:
        return None
    plans: list[FieldPlan] = []
    for field in module.fields:
        rows, columns = field.shape[::-1] if field.transposed else field.shape
        parts = [field.name]
        if field.name == "gate_up" and "gate_up" not in codecs and not module.interleaved:
            parts, rows = ["gate", "up"], rows // 2
        for name in parts:
            if name not in codecs:
                raise CheckpointError(
                    f"{module.prefix}: expert 0 has a packed down projection and no {name}; "
                    "the checkpoint is incomplete: make it again"
                )
            plans.append(_plan(tensors, module, name, (rows, columns), codecs[name]))
    return tuple(plans)


def _codecs(names: Iterable[str], start: str) -> dict[str, str]:
    """Codec of every packed field of one expert."""
    parts = (name.removeprefix(start).partition(".") for name in names if name.startswith(start))
    return {field: codec for field, _, codec in parts if field in ("gate_up", "gate", "up", "down")}


def _plan(
    tensors: Mapping[str, TensorEntry],
    module: ExpertsModule,
    field: str,
    shape: tuple[int, int],
    codec: str,
) -> FieldPlan:
    try:
        nbytes = get_codec(codec).nbytes(shape)
    except FormatError as error:
        raise CheckpointError(f"{module.prefix}: {error}; use a newer gangline") from error
    pieces = []
    for expert in range(module.experts):
        name = packed_name(module.prefix, expert, field, codec)
        entry = tensors.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name} is missing; the checkpoint is incomplete: make it again")
        if entry.dtype != "U8" or entry.nbytes != nbytes:
            raise CheckpointError(
                f"tensor {name} has {entry.nbytes} bytes ({entry.dtype}) where a matrix {shape} takes "
                f"{nbytes}; it belongs to another model or is damaged: make the checkpoint again"
            )
        pieces.append((Extent(entry.file, entry.offset, nbytes),))
    return FieldPlan(FieldSpec(field, shape, codec, nbytes), tuple(pieces))
