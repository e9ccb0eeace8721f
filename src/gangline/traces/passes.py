"""What a recorder keeps of forward passes until their documents are complete, and the columns they make.

Shape suffixes: B sequences, S tokens of one pass, T rows of one pass, R rows of all passes, K slots per
token.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from gangline.traces.rows import Array

Kept = Tensor | list[Any]
Kind = Literal["ids", "weights", "logits", "inputs"]
_FEW_ROWS, _FEW_COLUMNS = 4, 16


@dataclass
class Pass:
    """One forward pass: which rows count, and what the layers said.

    Attributes:
        ids_BS: token ids. keep_BS: False for padding, None if there is none.
        shape: B and S.
        decode: whether every sequence brings one token.
        predicted_BS: likeliest next tokens.
        ids, weights, logits, inputs: of each layer, ``[T, ...]``.
        all_ids, all_weights: of all layers, one ``[B, K]`` after another, in place of ``ids`` and
            ``weights`` where a whole step became known at once.
    """

    ids_BS: Array | None
    keep_BS: Array | None
    shape: tuple[int, int]
    decode: bool
    predicted_BS: Array | None = None
    ids: list[Kept] = field(default_factory=list)
    weights: list[Kept] = field(default_factory=list)
    logits: list[Kept] = field(default_factory=list)
    inputs: list[Kept] = field(default_factory=list)
    all_ids: Tensor | None = None
    all_weights: Tensor | None = None

    @property
    def routed(self) -> bool:
        """Whether any layer said something."""
        return bool(self.ids) or self.all_ids is not None

    def complete(self, layers: int) -> bool:
        """Whether all layers did."""
        return self.all_ids is not None or len(self.ids) == layers


class Columns:
    """The rows of passes, layer by layer.

    Args:
        passes: complete ones.
        top_k: K of each layer.
    """

    def __init__(self, passes: Sequence[Pass], top_k: Sequence[int]) -> None:
        self._top_k = tuple(top_k)
        self._ends = tuple(itertools.accumulate(top_k))
        self._runs = [list(run) for _, run in itertools.groupby(passes, key=_run_key)]
        self._whole: dict[tuple[Kind, int], Array] = {}

    def of(self, kind: Kind, layer: int) -> Array | None:
        """Return ``[R, ...]`` of one layer; None if it was not kept."""
        parts = [part for number in range(len(self._runs)) for part in self._parts(kind, layer, number)]
        return np.concatenate(parts) if parts else None

    def _parts(self, kind: Kind, layer: int, number: int) -> Iterator[Array]:
        run = self._runs[number]
        if run[0].all_ids is None:
            kept: list[list[Kept]] = [getattr(one, kind) for one in run]
            if kept[0]:
                yield from _arrays([values[layer] for values in kept])
            return
        whole = self._stacked(kind, number)
        if whole is not None:
            k, rows, end = self._top_k[layer], run[0].shape[0], self._ends[layer]
            yield whole[:, (end - k) * rows : end * rows].reshape(-1, k)

    def _stacked(self, kind: Kind, number: int) -> Array | None:
        """Return ``[passes, all layers' B times K]`` of one run of whole steps."""
        if kind not in ("ids", "weights") or getattr(self._runs[number][0], f"all_{kind}") is None:
            return None
        if (kind, number) not in self._whole:
            tensors: list[Tensor] = [getattr(one, f"all_{kind}") for one in self._runs[number]]
            self._whole[kind, number] = torch.stack(tensors).numpy()
        return self._whole[kind, number]


def _run_key(one: Pass) -> tuple[bool, int]:
    return one.all_ids is not None, one.shape[0]


def copied(values: Tensor, dtype: torch.dtype, rows: int) -> Kept:
    """Return a copy on the CPU; of the few numbers of a decoded token the quickest one is a list."""
    values = values.detach() if values.requires_grad else values
    if rows <= _FEW_ROWS and values.shape[1] <= _FEW_COLUMNS:
        return values.tolist()
    own = values.clone() if values.dtype is dtype else values.to(dtype)
    return own if own.device.type == "cpu" else own.cpu()


def _arrays(parts: Sequence[Kept]) -> Iterator[Array]:
    for few, run in itertools.groupby(parts, key=lambda part: isinstance(part, list)):
        if few:
            yield np.array([row for part in run for row in part])
        else:
            yield from (cast(Tensor, part).numpy() for part in run)
