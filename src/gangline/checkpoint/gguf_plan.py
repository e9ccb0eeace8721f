"""Which rows of a safetensors checkpoint make up each tensor of a GGUF file.

Legend: D hidden, E experts, F intermediate.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.checkpoint.gguf_names import FAMILIES, Family
from gangline.checkpoint.safetensors_index import SafetensorsIndex, read_into
from gangline.core.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = {"olmoe": "olmoe", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MATRIX_TYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_BLOCK = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q6_K": (256, 210),
}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_MIXTRAL_PARTS = {"w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True)
class Rows:
    """A run of rows of one stored tensor, seen as a matrix with its last dimension as columns."""

    tensor: str
    start: int
    count: int


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the GGUF file.

    Attributes:
        name: its GGUF name.
        shape: rows last but one, columns last (GGUF stores the reverse).
        type: name of its ggml type.
        rows: where its rows come from, in order.
        heads: number of attention heads whose rows are permuted for rotary pairs; 0: rows stay as they are.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    rows: tuple[Rows, ...]
    heads: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded tensor without padding."""
        block, size = _BLOCK[self.type]
        return math.prod(self.shape) // block * size


class SafetensorsRows:
    """Reads runs of rows from a folder of safetensors files with plain reads: no mapping, nothing kept.

    Raises:
        CheckpointError: the files are missing or broken.
        UnsupportedModelError: a tensor is stored in a dtype that GGUF has no place for.
    """

    def __init__(self, folder: Path) -> None:
        self.index = SafetensorsIndex.from_folder(folder)
        for entry in self.index:
            if entry.dtype not in _DTYPES:
                raise UnsupportedModelError(
                    f"{entry.name} in {folder} is {entry.dtype}; GGUF is written from F32, F16 or BF16"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.index.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return self.index.tensors[name].shape

    def read(self, rows: Rows) -> Tensor:
        """Return the rows as a ``(count, columns)`` tensor in the stored dtype."""
        entry = self.index.entry(rows.tensor)
        dtype, path = _DTYPES[entry.dtype], self.index.files[entry.file]
        width = entry.shape[-1] * dtype.itemsize
        buffer = torch.empty(rows.count * width, dtype=torch.uint8)
        with path.open("rb", buffering=0) as stream:
            read_into(stream, entry.offset + rows.start * width, buffer, path)
        return buffer.view(dtype).view(rows.count, entry.shape[-1])


@dataclass(frozen=True)
class Plan:
    """All tensors of the file, in order, and where their rows are read."""

    family: Family
    source: SafetensorsRows
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class MatrixTypes:
    """Which ggml type each matrix gets.

    Attributes:
        type: of the file, for example ``q4_0``.
        head: type of the head instead of the usual one; None keeps that.
        tied: whether the embedding is the head as well.
        experts: per layer.
    """

    type: str
    head: str | None
    tied: bool
    experts: int

    def of(self, name: str, columns: int) -> str:
        """Return the type of one matrix, as llama.cpp's own quantize tool chooses it."""
        chosen = _MATRIX_TYPES[self.type]
        if name == (_EMBEDDING if self.tied else _HEAD):
            chosen = self._head(columns)
        elif chosen == "Q4_0" and self.experts == 8 and name.endswith(("attn_k.weight", "attn_v.weight")):
            chosen = "Q8_0"  # small beside eight experts
        return "F16" if columns % _BLOCK[chosen][0] else chosen

    def _head(self, columns: int) -> str:
        if self.head is not None:
            return _MATRIX_TYPES[self.head]
        if self.type != "q4_0":
            return _MATRIX_TYPES[self.type]
        return "Q8_0" if columns % _BLOCK["Q6_K"][0] else "Q6_K"


def plan_tensors(folder: Path, config: Any, type: str, head: str | None = None) -> Plan:
    """Plan the GGUF file of one transformers folder from its headers.

    Args:
        folder: with safetensors files.
        config: the transformers config.
        type: of the matrices.
        head: type of the head, None for what llama.cpp's quantize tool would choose.

    Raises:
        CheckpointError: an expert or a dense tensor is missing.
        UnsupportedModelError: the folder holds a tensor that llama.cpp's architecture does not have.
    """
    family = FAMILIES[ARCHITECTURES[config.model_type]]
    source = SafetensorsRows(folder)
    has_head = "lm_head.weight" in source
    # These two architectures of llama.cpp do not fall back to the embedding.
    copies_head = not has_head and family.arch in ("olmoe", "qwen2moe")
    types = MatrixTypes(type, head, not has_head and not copies_head, config.num_experts)
    tensors = [*_dense_tensors(family, source, config, types), *_expert_tensors(source, config, types)]
    missing = {_EMBEDDING, "output_norm.weight"} - {tensor.name for tensor in tensors}
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(sorted(missing))}; the checkpoint is incomplete")
    if copies_head:
        embedding = next(tensor for tensor in tensors if tensor.name == _EMBEDDING)
        kind = types.of(_HEAD, embedding.shape[-1])
        tensors.append(OutTensor(_HEAD, embedding.shape, kind, embedding.rows))
    return Plan(family, source, tuple(sorted(tensors, key=lambda tensor: _place(tensor.name))))


def _place(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) + 1, name) if match else (0, name)


def _dense_tensors(
    family: Family, source: SafetensorsRows, config: Any, types: MatrixTypes
) -> Iterator[OutTensor]:
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    for stored in source.index.tensors:
        if ".experts." in stored or stored.endswith("rotary_emb.inv_freq"):
            continue
        name = family.gguf_name(stored.replace(".block_sparse_moe.", ".mlp."))
        if name is None:
            raise UnsupportedModelError(
                f"llama.cpp's {family.arch} architecture has no tensor for {stored}; "
                "this model cannot become a GGUF file"
            )
        shape = source.shape(stored)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            shape = shape[-1:]
        kept = len(shape) == 1 or "ffn_gate_inp" in name
        yield OutTensor(
            name,
            shape,
            "F32" if kept else types.of(name, shape[-1]),
            (Rows(stored, 0, math.prod(source.shape(stored)[:-1])),),
            next((n for end, n in heads.items() if family.permuted and name.endswith(end)), 0),
        )


def _expert_tensors(source: SafetensorsRows, config: Any, types: MatrixTypes) -> Iterator[OutTensor]:
    for layer in range(config.num_hidden_layers):
        for part in ("gate", "up", "down"):
            rows = tuple(_expert_rows(source, layer, expert, part) for expert in range(config.num_experts))
            columns = source.shape(rows[0].tensor)[-1]
            if len({(row.count, source.shape(row.tensor)[-1]) for row in rows}) > 1:
                raise CheckpointError(
                    f"the experts of layer {layer} differ in the shape of {part}; the folder is corrupt"
                )
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            yield OutTensor(name, (len(rows), rows[0].count, columns), types.of(name, columns), rows)


def _expert_rows(source: SafetensorsRows, layer: int, expert: int, part: str) -> Rows:
    """Find one matrix of one expert: stored alone (either naming) or inside its layer's fused tensors."""
    base = f"model.layers.{layer}"
    mixtral = next(name for name, role in _MIXTRAL_PARTS.items() if role == part)
    for name in (
        f"{base}.mlp.experts.{expert}.{part}_proj.weight",
        f"{base}.block_sparse_moe.experts.{expert}.{mixtral}.weight",
    ):
        if name in source:
            return Rows(name, 0, source.shape(name)[0])
    fused = f"{base}.mlp.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}"
    if fused not in source:
        raise CheckpointError(
            f"expert {expert} of layer {layer} has no {part} matrix; the checkpoint is incomplete"
        )
    rows = source.shape(fused)[1]
    if part == "down":
        return Rows(fused, expert * rows, rows)
    return Rows(fused, expert * rows + (rows // 2 if part == "up" else 0), rows // 2)
