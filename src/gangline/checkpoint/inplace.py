"""When an expert's bytes can be used where a checkpoint holds them: conversion as arithmetic on positions.

Shapes in comments: E experts, F intermediate, D hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gangline.checkpoint.mapping import Assembly
from gangline.checkpoint.safetensors_header import TensorEntry
from gangline.checkpoint.safetensors_index import SafetensorsIndex
from gangline.checkpoint.source import ExpertsModule
from gangline.core.layout import Extent, FieldSpec, ModuleField

if TYPE_CHECKING:
    from transformers.core_model_loading import ConversionOps

CODECS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""Dense codec of each safetensors dtype."""


@dataclass(frozen=True)
class FieldPlan:
    """One field of every expert of a layer, as it will be delivered.

    Attributes:
        spec: the field.
        pieces: for each expert the byte ranges that make the field, joined in this order; ``None`` if the
            field comes out of a conversion.
    """

    spec: FieldSpec
    pieces: tuple[tuple[Extent, ...], ...] | None


def plan_in_place(
    index: SafetensorsIndex, assembly: Assembly, field: ModuleField, module: ExpertsModule
) -> list[FieldPlan] | None:
    """Express a parameter's conversion as byte ranges per expert.

    Understood are renaming, one tensor per expert (``MergeModulelist``), gate and up apart (``Concatenate``
    along the output) and transposed storage (``Transpose``). A field ``gate_up`` whose halves lie apart
    becomes two.

    Returns:
        One plan (``gate_up`` apart: two), or ``None`` if any byte must change or the shapes do not agree.
    """
    operations = assembly.converter.operations if assembly.converter is not None else []
    steps = _read_steps(operations, field.transposed)
    if steps is None or (steps.joined and (field.name != "gate_up" or module.interleaved)):
        return None
    patterns = assembly.converter.source_patterns if assembly.converter is not None else [""]
    parts = [[index.entry(name) for name in assembly.sources[pattern]] for pattern in patterns]
    if len(parts) != (2 if steps.joined else 1):
        return None
    rows, columns = field.shape
    if steps.joined:
        rows, columns = (rows, columns // 2) if field.transposed else (rows // 2, columns)
    plans = []
    for name, entries in zip(("gate", "up") if steps.joined else (field.name,), parts, strict=True):
        plan = _plan_part(entries, name, (rows, columns), field, module, steps)
        if plan is None:
            return None
        plans.append(plan)
    return plans


@dataclass(frozen=True)
class _Steps:
    stacked: bool = False
    joined: bool = False
    swapped: bool = False
    swap_checks: bool = False


def _read_steps(operations: "Sequence[ConversionOps]", transposed: bool) -> _Steps | None:
    """Recognise operations by exact class: a subclass that does more must not pass for its parent."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    stacked = joined = swapped = checks = False
    for operation in operations:
        if type(operation) is MergeModulelist and operation.dim == 0 and not (stacked or joined or swapped):
            stacked = True
        elif type(operation) is Concatenate and not (joined or swapped):
            if operation.dim % 3 != (2 if transposed else 1) or operation.num_shards_attribute is not None:
                return None
            joined = True
        elif type(operation) is Transpose and not (joined or swapped):
            if {operation.dim0 % 3, operation.dim1 % 3} != {1, 2}:
                return None
            swapped, checks = True, operation.check_dims
        else:
            return None
    return _Steps(stacked, joined, swapped, checks)


def _plan_part(
    entries: list[TensorEntry],
    name: str,
    shape: tuple[int, int],
    field: ModuleField,
    module: ExpertsModule,
    steps: _Steps,
) -> FieldPlan | None:
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) != 1 or not dtypes <= CODECS.keys():
        return None
    stored, flipped = shape, field.transposed
    slices = _slices(field, module)
    whole = entries[0].shape == (slices, *shape)
    if steps.swapped and not (steps.swap_checks and whole):
        stored, flipped = (shape[1], shape[0]), not field.transposed
    if steps.stacked:
        nbytes = entries[0].nbytes
        if len(entries) not in (slices, module.experts) or any(entry.shape != stored for entry in entries):
            return None
        pieces = tuple((Extent(entry.file, entry.offset, nbytes),) for entry in entries[: module.experts])
    else:
        entry, nbytes = entries[0], entries[0].nbytes // slices
        if len(entries) != 1 or entry.shape not in _fused_shapes(slices, stored):
            return None
        pieces = tuple(
            (Extent(entry.file, entry.offset + i * nbytes, nbytes),) for i in range(module.experts)
        )
    return FieldPlan(FieldSpec(name, stored, CODECS[dtypes.pop()], nbytes, flipped), pieces)


def _slices(field: ModuleField, module: ExpertsModule) -> int:
    """Experts that a parameter has room for: more than are real where some are mere identities (LongCat)."""
    shape = module.params.get(field.parameter, ())
    return shape[0] if len(shape) == 3 else module.experts


def _fused_shapes(slices: int, stored: tuple[int, int]) -> list[tuple[int, ...]]:
    """(E, rows, columns), or the flat (E * rows, columns) of modules that keep two dimensions."""
    return [(slices, *stored), (slices * stored[0], stored[1])]


def plan_each(index: SafetensorsIndex, assemblies: list[Assembly], field: ModuleField) -> FieldPlan | None:
    """Byte ranges of a field whose experts are modules of their own, each with a parameter of its own."""
    entries = [index.entry(assembly.names[0]) for assembly in assemblies]
    simple = all(assembly.converter is None and not assembly.packed for assembly in assemblies)
    dtypes = {entry.dtype for entry in entries}
    if not simple or len(dtypes) != 1 or not dtypes <= CODECS.keys():
        return None
    if any(entry.shape != field.shape for entry in entries):
        return None
    pieces = tuple((Extent(entry.file, entry.offset, entry.nbytes),) for entry in entries)
    spec = FieldSpec(field.name, field.shape, CODECS[dtypes.pop()], entries[0].nbytes, field.transposed)
    return FieldPlan(spec, pieces)


def plan_packed(
    index: SafetensorsIndex, assembly: Assembly, field: ModuleField, experts: int
) -> FieldPlan | None:
    """Byte ranges of an MXFP4 field: blocks (E, out, in / 32, 16), then scales (E, out, in / 32), both uint8.

    The packed rows run along the input, whatever the module's own order: the field is never transposed.
    """
    rows, columns = field.shape[::-1] if field.transposed else field.shape
    blocks, scales = (index.entry(assembly.sources[part][0]) for part in ("_blocks", "_scales"))
    shape = (experts, rows, columns // 32)
    if {blocks.dtype, scales.dtype} != {"U8"} or columns % 32:
        return None
    if scales.shape != shape or blocks.shape != (*shape, 16):
        return None
    sizes = [(entry, math.prod(entry.shape[1:])) for entry in (blocks, scales)]
    pieces = tuple(
        tuple(Extent(entry.file, entry.offset + i * size, size) for entry, size in sizes)
        for i in range(experts)
    )
    return FieldPlan(FieldSpec(field.name, (rows, columns), "mxfp4", sum(size for _, size in sizes)), pieces)
