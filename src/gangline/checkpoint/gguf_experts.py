"""The experts of a GGUF file: read in place where our formats know the type, else converted layer by layer.

llama.cpp stacks the experts of a block, ``blk.3.ffn_gate_exps.weight`` of shape (E, F, D), so that every
expert is one run of bytes. Some files fuse gate and up, ``ffn_gate_up_exps`` (E, 2F, D), and old ones store
every expert alone, ``blk.3.ffn_gate.7.weight``. All become the fields ``gate``, ``up``, ``down``, (out, in).

Legend: D hidden, E experts, F intermediate.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gangline.checkpoint.gguf_decode import decode, known_type, read_bytes
from gangline.checkpoint.gguf_header import GGUFTensor
from gangline.checkpoint.source import ExpertsModule
from gangline.core.errors import CheckpointError
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout, Extent, FieldSpec
from gangline.formats import dense_codec_name

EXPERT_WEIGHT = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)(?:_exps|\.\d+)\.weight")
_PREFIX = re.compile(r"model\.layers\.(\d+)\..+")


class _Slice(NamedTuple):
    """One matrix of one expert inside a tensor."""

    tensor: GGUFTensor
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFExpertSource:
    """See :class:`gangline.checkpoint.source.ExpertSource`.

    Attributes:
        layouts: fields ``gate``, ``up``, ``down`` per layer.
        catalog: byte ranges in the file, or ``None`` if a type has to be converted.
        notes: which types are converted.
        slices: for every layer and expert, the packed bytes of each field.
        dtype: what unknown types are converted to.
    """

    layouts: tuple[ExpertLayout, ...]
    catalog: ExpertCatalog | None
    notes: tuple[str, ...]
    slices: tuple[tuple[tuple[_Slice, ...], ...], ...]
    dtype: torch.dtype

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each layer."""
        return tuple(len(layer) for layer in self.slices)

    def read_layer(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield the experts of one layer, one at a time."""
        for expert, fields in enumerate(self.slices[layer]):
            specs = self.layouts[layer].fields
            yield expert, tuple(self._read(part, spec) for part, spec in zip(fields, specs, strict=True))

    def _read(self, part: _Slice, spec: FieldSpec) -> Tensor:
        raw = read_bytes(part.tensor, part.start, part.nbytes)
        if known_type(part.tensor.type):
            return raw
        return decode(part.tensor, raw, spec.shape, self.dtype).contiguous().view(-1).view(torch.uint8)


def make_source(
    path: Path, tensors: Mapping[str, GGUFTensor], modules: Sequence[ExpertsModule], dtype: torch.dtype
) -> GGUFExpertSource:
    """Find every expert of ``modules`` and check its shape.

    Raises:
        CheckpointError: an expert is missing or its shape is not the module's.
    """
    layouts, slices = [], []
    for module in modules:
        match = _PREFIX.fullmatch(module.prefix)
        if match is None:
            raise CheckpointError(f"{path}: no block of a GGUF file belongs to {module.prefix}")
        block = _Block(path, tensors, int(match[1]), module)
        layouts.append(block.layout(dtype))
        slices.append(tuple(block.slices(expert) for expert in range(module.experts)))
    types = {part.tensor.type for layer in slices for fields in layer for part in fields}
    unknown = sorted(kind for kind in types if not known_type(kind))
    notes = tuple(f"experts stored as {kind} are converted to {dense_codec_name(dtype)}" for kind in unknown)
    catalog = None if unknown else _catalog(layouts, slices)
    return GGUFExpertSource(tuple(layouts), catalog, notes, tuple(slices), dtype)


def _catalog(
    layouts: Sequence[ExpertLayout], slices: Sequence[tuple[tuple[_Slice, ...], ...]]
) -> ExpertCatalog:
    files: dict[Path, int] = {}
    extents: dict[ExpertKey, tuple[Extent, ...]] = {}
    for layer, experts in enumerate(slices):
        for expert, fields in enumerate(experts):
            extents[ExpertKey(layer, expert)] = tuple(
                Extent(
                    files.setdefault(part.tensor.file, len(files)),
                    part.tensor.offset + part.start,
                    part.nbytes,
                )
                for part in fields
            )
    return ExpertCatalog(tuple(files), tuple(layouts), extents)


class _Block:
    """The expert tensors of one block, whichever way they are stored."""

    def __init__(
        self, path: Path, tensors: Mapping[str, GGUFTensor], number: int, module: ExpertsModule
    ) -> None:
        self.path, self.tensors, self.base, self.module = path, tensors, f"blk.{number}.ffn_", module
        down = module.params["down_proj"]
        self.hidden, self.inner = (down[2], down[1]) if module.transposed else (down[1], down[2])

    def slices(self, expert: int) -> tuple[_Slice, ...]:
        """The fields of one expert, in slot order."""
        parts = ("gate", "up", "down") if self.module.has_gate else ("up", "down")
        return tuple(self._find(part, expert) for part in parts)

    def layout(self, dtype: torch.dtype) -> ExpertLayout:
        """The layout that all experts of the block share."""
        names = ("gate", "up", "down") if self.module.has_gate else ("up", "down")
        fields = []
        for name, part in zip(names, self.slices(0), strict=True):
            shape = self._shape(name)
            if known_type(part.tensor.type):
                fields.append(FieldSpec(name, shape, f"ggml:{part.tensor.type}", part.nbytes))
            else:
                nbytes = shape[0] * shape[1] * dtype.itemsize
                fields.append(FieldSpec(name, shape, dense_codec_name(dtype), nbytes))
        return ExpertLayout(tuple(fields))

    def _shape(self, part: str) -> tuple[int, int]:
        return (self.hidden, self.inner) if part == "down" else (self.inner, self.hidden)

    def _find(self, part: str, expert: int) -> _Slice:
        rows, columns = self._shape(part)
        experts = self.module.experts
        stacked = self.tensors.get(f"{self.base}{part}_exps.weight")
        if stacked is not None:
            self._check(stacked, (experts, rows, columns))
            nbytes = stacked.nbytes // experts
            return _Slice(stacked, expert * nbytes, nbytes)
        fused = self.tensors.get(f"{self.base}gate_up_exps.weight")
        if fused is not None and part != "down":
            self._check(fused, (experts, 2 * rows, columns))
            nbytes = fused.nbytes // experts // 2
            return _Slice(fused, (2 * expert + (part == "up")) * nbytes, nbytes)
        single = self.tensors.get(f"{self.base}{part}.{expert}.weight")
        if single is None:
            raise CheckpointError(
                f"{self.path}: {self.base}{part}_exps.weight is missing (experts of {self.module.prefix}); "
                "download the file again"
            )
        self._check(single, (rows, columns))
        first = self.tensors.get(f"{self.base}{part}.0.weight", single)
        if single.type != first.type:
            raise CheckpointError(
                f"{self.path}: experts 0 and {expert} of {self.module.prefix} are stored as {first.type} and "
                f"{single.type}; convert the model again"
            )
        return _Slice(single, 0, single.nbytes)

    def _check(self, tensor: GGUFTensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected:
            raise CheckpointError(
                f"{self.path}: {tensor.name} has shape {tensor.shape}, {self.module.prefix} needs "
                f"{expected}; convert the model again"
            )
