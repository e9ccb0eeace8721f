"""Which tensors of a checkpoint become which parameter of a model, by transformers' own conversion tables.

transformers renames every checkpoint tensor and may gather several of them into one parameter (the experts of
a layer, gate and up); the tables differ per model family. We run the same functions over the names alone.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

PACKED_PARTS = ("_blocks", "_scales")
"""Suffixes of the two tensors that hold one MXFP4 parameter (gpt-oss)."""


@dataclass
class Assembly:
    """How one parameter is made.

    Attributes:
        target: name of the parameter in the model.
        converter: what turns the tensors into the parameter; ``None`` if one tensor is the parameter.
        first: the parameter under whose name the converter runs, where it makes several.
        sources: names of the checkpoint tensors under each source pattern of the converter, in expert order;
            without a converter one tensor under ``""``, or the parts of a packed parameter by suffix.
    """

    target: str
    converter: "WeightConverter | None" = None
    first: str = ""
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether the parameter is stored as blocks and scales."""
        return set(self.sources) == set(PACKED_PARTS)

    @property
    def names(self) -> list[str]:
        """All checkpoint tensors that make the parameter."""
        return [name for names in self.sources.values() for name in names]


def assemble(
    names: Iterable[str], model: "PreTrainedModel", targets: Collection[str], where: Path
) -> dict[str, Assembly]:
    """Find the checkpoint tensors of the given parameters.

    Args:
        names: all tensor names of the checkpoint.
        model: the model (its parameters may be on ``meta``).
        targets: parameters to look for; the model need not hold them any more.
        where: the checkpoint, for errors.

    Returns:
        One assembly for each target of which at least one tensor is there.

    Raises:
        CheckpointError: two tensors become the same parameter.
    """
    from transformers.core_model_loading import dot_natural_key

    rename = _Renamer(model, targets)
    found: dict[str, Assembly] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern, converter = rename(name)
        if converter is not None and pattern is not None:
            for twin in rename.twins(target, converter):
                assembly = found.setdefault(twin, Assembly(twin, converter, target))
                assembly.sources.setdefault(pattern, []).append(name)
            continue
        part = ""
        if target not in targets:
            part = next((suffix for suffix in PACKED_PARTS if name.endswith(suffix)), "")
            target = rename(name.removesuffix(part))[0] if part else target
        if target not in targets:
            continue
        assembly = found.setdefault(target, Assembly(target))
        if part in assembly.sources or assembly.converter is not None:
            raise CheckpointError(
                f"{where}: {name} and {assembly.names[0]} both become {target}; "
                "remove the one that does not belong to this checkpoint"
            )
        assembly.sources[part] = [name]
    return found


class _Renamer:
    """transformers' loading order of renamings, converters and prefixes, for names alone."""

    def __init__(self, model: "PreTrainedModel", targets: Collection[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        self._rename: Any = rename_source_key
        self._renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        self._converters = [item for item in transforms if isinstance(item, WeightConverter)]
        self._by_pattern = {pattern: item for item in self._converters for pattern in item.source_patterns}
        self._prefix = model.base_model_prefix
        self._targets = targets
        self._known: dict[str, Any] = {**model.state_dict(), **dict.fromkeys(targets, True)}

    def __call__(self, name: str) -> "tuple[str, str | None, WeightConverter | None]":
        """The parameter that a tensor goes to, and the source pattern and converter that take it there."""
        renamed, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._known)
        if renamed not in self._known and name in self._known:
            renamed, pattern = self._rename(name, [], [], self._prefix, self._known)
        return renamed, pattern, None if pattern is None else self._by_pattern[pattern]

    def twins(self, target: str, converter: "WeightConverter") -> list[str]:
        """All wanted parameters that a converter makes together with ``target``."""
        first = converter.target_patterns[0]
        names = [target.replace(first, pattern) for pattern in converter.target_patterns]
        return [name for name in names if name in self._targets]


def missing_sources(assembly: Assembly, experts: int) -> list[str]:
    """Name the checkpoint tensors that a converter needs and the checkpoint lacks.

    Args:
        assembly: tensors found under the converter's patterns; one pattern may hold one tensor per expert.
        experts: number of experts E of the parameter's module.
    """
    if assembly.converter is None:
        name = assembly.names[0]
        present = [part for part in PACKED_PARTS if part in assembly.sources]
        absent = [part for part in PACKED_PARTS if part not in assembly.sources]
        return [name.removesuffix(present[0]) + absent[0]] if present and absent else []
    lost: list[str] = []
    sibling_pattern, siblings = max(assembly.sources.items(), key=lambda item: len(item[1]))
    for pattern in assembly.converter.source_patterns:
        names = assembly.sources.get(pattern)
        if names is None:
            names = [_translate(name, sibling_pattern, pattern) for name in siblings]
            lost += names
        if "*" in pattern:
            lost += _missing_ids(names, experts)
    return lost


def _translate(name: str, from_pattern: str, to_pattern: str) -> str:
    """The name under another pattern of the same converter, for messages."""
    old, new = (re.sub(r"\\(.)", r"\1", pattern).rpartition("*")[2] for pattern in (from_pattern, to_pattern))
    return name.removesuffix(old) + new if name.endswith(old) else to_pattern


def _missing_ids(names: list[str], experts: int) -> list[str]:
    """Names of the experts that a run of names leaves out; the id is the one part in which they differ."""
    if len(names) == experts == 1:
        return []
    rows = [name.split(".") for name in names]
    varying = [i for i, parts in enumerate(zip(*rows, strict=False)) if len(set(parts)) > 1]
    if len(varying) != 1 or not all(row[varying[0]].isdigit() for row in rows):
        return [f"{names[0]} and the like ({experts} needed, {len(names)} found)"]
    at = varying[0]
    ids = {int(row[at]) for row in rows}
    return [".".join([*rows[0][:at], str(i), *rows[0][at + 1 :]]) for i in range(experts) if i not in ids]
