"""The recorder: an observer of routing that writes a trace.

Shape suffixes: B sequences, S tokens of one pass, T rows of one pass, R rows of one document group,
K slots per token, N routed experts, D hidden.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gangline.traces.header import Extra, TraceError
from gangline.traces.observer import LayerRouting
from gangline.traces.rows import UNKNOWN, Array, LayerRows, TokenTable, join_layers
from gangline.traces.shards import Document
from gangline.traces.writer import TraceWriter

logger = logging.getLogger(__name__)


@dataclass
class _Pass:
    """One forward pass: which rows count, and what the layers said."""

    ids_BS: Array | None
    keep_BS: Array | None
    shape: tuple[int, int]
    decode: bool
    predicted_BS: Array | None = None
    layers: list[LayerRouting] = field(default_factory=list)


class Recorder:
    """Notes the passes of one group of documents after another. Passes outside a group are not recorded.

    Args:
        writer: where the rows go; its header says what is kept.
        special_ids: token ids that the tokenizer calls special.

    Attributes:
        wants: the extras of the header.
    """

    def __init__(self, writer: TraceWriter, special_ids: Collection[int] = ()) -> None:
        self.writer = writer
        self.wants: Collection[Extra] = writer.header.extras
        self._special = np.array(sorted(special_ids), dtype=np.int64)
        self._layers = len(writer.header.layers)
        self._passes: list[_Pass] | None = None

    @contextmanager
    def documents(
        self, sources: Sequence[str], labels: Mapping[str, Sequence[str]] | None = None
    ) -> Iterator[None]:
        """Record the passes inside this block as ``len(sources)`` documents, one per sequence of the batch.

        If an exception leaves the block nothing of the group is kept.

        Args:
            sources: where each sequence comes from, in words.
            labels: for each kind of label its name for each sequence; the same kinds in the whole trace.

        Raises:
            TraceError: another group is being recorded, or a pass had another number of sequences.
        """
        if self._passes is not None:
            raise TraceError("documents are being recorded already; leave that block first")
        self._passes = []
        try:
            yield
            passes = [one for one in self._passes if one.layers]
            if passes:
                self._commit(passes, sources, labels or {})
        finally:
            self._passes = None

    def on_pass(self, ids_BS: Tensor | None, keep_BS: Tensor | None, shape: tuple[int, int]) -> None:
        """Begin a pass."""
        if self._passes is None:
            return
        ids = None if ids_BS is None else ids_BS.detach().cpu().numpy().astype(np.int64)
        keep = None if keep_BS is None else keep_BS.detach().cpu().numpy().astype(bool)
        if keep is not None and keep.all():
            keep = None
        self._passes.append(_Pass(ids, keep, shape, decode=shape[1] == 1))

    def on_routing(self, layer: int, routing: LayerRouting) -> None:
        """Keep a copy of what one layer decided, in the smallest type that can hold it."""
        if not self._passes:
            return
        current = self._passes[-1]
        rows = current.shape[0] * current.shape[1]
        if layer != len(current.layers) or len(routing.ids_TK) != rows:
            raise TraceError(
                f"layer {layer} routed {len(routing.ids_TK)} rows where layer {len(current.layers)} and "
                f"{rows} rows were expected; record one part of this model (stack=...) or report its class"
            )
        header = self.writer.header
        kept = routing.ids_TK.detach().to("cpu", torch.int16, copy=True)
        weights = routing.weights_TK if header.mode == "full" else None
        extras = (weights, routing.logits_TE, routing.inputs_TD)
        half = [None if t is None else t.detach().to("cpu", torch.float16, copy=True) for t in extras]
        current.layers.append(LayerRouting(kept, kept if half[0] is None else half[0], half[1], half[2]))

    def on_predicted(self, ids_BS: Tensor) -> None:
        """Keep the likeliest next tokens of the pass."""
        if self._passes:
            self._passes[-1].predicted_BS = ids_BS.detach().cpu().numpy()

    def _commit(
        self, passes: list[_Pass], sources: Sequence[str], labels: Mapping[str, Sequence[str]]
    ) -> None:
        if any(one.shape[0] != len(sources) or len(one.layers) != self._layers for one in passes):
            raise TraceError(
                f"a pass had other sequences than the {len(sources)} announced, or did not go through all "
                f"{self._layers} layers; record each batch in a block of its own"
            )
        first = self.writer.documents
        tokens = self._tokens(passes, first, len(sources), labels)
        documents = [
            Document(
                first + row,
                source,
                int((tokens.doc == first + row).sum()),
                _digest(tokens.input_id[tokens.doc == first + row]),
                {kind: names[row] for kind, names in labels.items()},
            )
            for row, source in enumerate(sources)
        ]
        self.writer.add(documents, tokens, [self._layer(passes, number) for number in range(self._layers)])

    def _tokens(
        self, passes: list[_Pass], first: int, rows: int, labels: Mapping[str, Sequence[str]]
    ) -> TokenTable:
        seen_B = np.zeros(rows, dtype=np.int64)
        columns: dict[str, list[Array]] = {
            name: [] for name in ("input", "pred", "row", "position", "step", "phase")
        }
        for number, one in enumerate(passes):
            keep_BS = np.ones(one.shape, dtype=bool) if one.keep_BS is None else one.keep_BS
            row_T, place_T = np.nonzero(keep_BS)
            position_BS = seen_B[:, None] + np.cumsum(keep_BS, axis=1) - 1
            seen_B += keep_BS.sum(axis=1)
            unknown_BS = np.full(one.shape, UNKNOWN, dtype=np.int64)
            pred_BS = unknown_BS.copy()
            if one.predicted_BS is not None:
                pred_BS[:, -one.predicted_BS.shape[1] :] = one.predicted_BS
            columns["input"].append((unknown_BS if one.ids_BS is None else one.ids_BS)[row_T, place_T])
            columns["pred"].append(pred_BS[row_T, place_T])
            columns["row"].append(row_T)
            columns["position"].append(position_BS[row_T, place_T])
            columns["step"].append(np.full(len(row_T), self.writer.steps + number))
            columns["phase"].append(np.full(len(row_T), int(one.decode)))
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        row_R = joined["row"]
        numbers = {
            kind: np.array([self.writer.label(kind, n) for n in names]) for kind, names in labels.items()
        }
        return TokenTable(
            input_id=joined["input"],
            next_id=_following(joined["input"], row_R, rows),
            pred_id=joined["pred"],
            doc=first + row_R,
            position=joined["position"],
            step=joined["step"],
            phase=joined["phase"],
            is_special=np.isin(joined["input"], self._special),
            labels={kind: values[row_R] for kind, values in numbers.items()},
        )

    def _layer(self, passes: list[_Pass], number: int) -> LayerRows:
        experts = self.writer.header.layers[number].experts
        full = self.writer.header.mode == "full"
        return join_layers([_rows(one, number, experts, full) for one in passes])


def _rows(one: _Pass, number: int, experts: int, full: bool) -> LayerRows:
    routing = one.layers[number]
    pick = slice(None) if one.keep_BS is None else one.keep_BS.ravel()
    ids_TK = routing.ids_TK.numpy()[pick].view(np.uint16)
    keep_TK = ids_TK < experts
    empty = not keep_TK.all()
    weights_TK = routing.weights_TK.numpy()[pick] if full else None
    return LayerRows(
        ids_RK=np.where(keep_TK, ids_TK, 0) if empty else ids_TK,
        keep_RK=keep_TK if empty else None,
        weights_RK=np.where(keep_TK, weights_TK, 0) if empty and weights_TK is not None else weights_TK,
        logits_RN=None if routing.logits_TE is None else routing.logits_TE.numpy()[pick],
        inputs_RD=None if routing.inputs_TD is None else routing.inputs_TD.numpy()[pick],
    )


def _following(input_R: Array, row_R: Array, rows: int) -> Array:
    """The next token of the same sequence; unknown after the last one."""
    out_R = np.full(len(input_R), UNKNOWN, dtype=np.int64)
    for row in range(rows):
        (mine,) = np.nonzero(row_R == row)
        out_R[mine[:-1]] = input_R[mine[1:]]
    return out_R


def _digest(ids: Array) -> str:
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
