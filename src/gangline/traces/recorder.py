"""The recorder: an observer of routing that writes a trace.

Shape suffixes: B sequences, S tokens of one pass, T rows of one pass, R rows of one document group,
K slots per token, N routed experts, D hidden.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gangline.traces.header import Extra, TraceError
from gangline.traces.observer import LayerRouting, StepRouting
from gangline.traces.passes import Columns, Kind, Pass, copied
from gangline.traces.rows import UNKNOWN, Array, LayerRows, TokenTable
from gangline.traces.shards import Document
from gangline.traces.writer import TraceWriter


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
        self._chosen = sum(writer.header.top_k)
        self._full = writer.header.mode == "full"
        self._passes: list[Pass] | None = None

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
            passes = [one for one in self._passes if one.routed]
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
        self._passes.append(Pass(ids, keep, shape, decode=shape[1] == 1))

    def on_routing(self, layer: int, routing: LayerRouting) -> None:
        """Keep a copy of what one layer decided, in the smallest type that can hold it."""
        if not self._passes:
            return
        current = self._passes[-1]
        rows = current.shape[0] * current.shape[1]
        ids = copied(routing.ids_TK, torch.int16, rows)
        if layer != len(current.ids) or len(ids) != rows:
            raise TraceError(
                f"layer {layer} routed {len(ids)} rows where layer {len(current.ids)} and {rows} rows were "
                "expected; record one part of this model (stack=...) or report its class"
            )
        current.ids.append(ids)
        if self._full:
            current.weights.append(copied(routing.weights_TK, torch.float16, rows))
        if routing.logits_TE is not None:
            current.logits.append(copied(routing.logits_TE, torch.float16, rows))
        if routing.inputs_TD is not None:
            current.inputs.append(copied(routing.inputs_TD, torch.float16, rows))

    def on_step(self, routing: StepRouting) -> None:
        """Keep what all layers of one pass decided: as it is of a token, in small numbers of a prompt."""
        if not self._passes:
            return
        current = self._passes[-1]
        if current.shape[1] > 1:
            for layer, (ids_TK, weights_TK) in enumerate(routing):
                self.on_routing(layer, LayerRouting(ids_TK, weights_TK))
            return
        if len(routing.ids) != self._chosen * current.shape[0]:
            raise TraceError(
                f"a step routed {len(routing.ids)} times where {self._chosen * current.shape[0]} were "
                "expected; record with the header of this model"
            )
        current.all_ids = routing.ids
        if self._full:
            current.all_weights = routing.weights

    def on_predicted(self, ids_BS: Tensor) -> None:
        """Keep the likeliest next tokens of the pass."""
        if self._passes:
            self._passes[-1].predicted_BS = ids_BS.detach().cpu().numpy()

    def _commit(
        self, passes: list[Pass], sources: Sequence[str], labels: Mapping[str, Sequence[str]]
    ) -> None:
        if any(one.shape[0] != len(sources) or not one.complete(self._layers) for one in passes):
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
        keep_R, columns = _real_rows(passes), Columns(passes, self.writer.header.top_k)
        layers = [self._layer(columns, number, keep_R) for number in range(self._layers)]
        self.writer.add(documents, tokens, layers)

    def _tokens(
        self, passes: list[Pass], first: int, rows: int, labels: Mapping[str, Sequence[str]]
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

    def _layer(self, columns: Columns, number: int, keep_R: Array | None) -> LayerRows:
        experts = self.writer.header.layers[number].experts

        def rows(kind: Kind) -> Array | None:
            joined = columns.of(kind, number)
            return joined if joined is None or keep_R is None else joined[keep_R]

        ids_RK = rows("ids")
        assert ids_RK is not None
        ids_RK = ids_RK.astype(np.uint16)  # a negative id is out of range as well
        weights_RK = rows("weights")
        there_RK = ids_RK < experts
        some_empty = not there_RK.all()
        if some_empty:
            ids_RK = np.where(there_RK, ids_RK, 0)
            weights_RK = None if weights_RK is None else np.where(there_RK, weights_RK, 0)
        return LayerRows(ids_RK, there_RK if some_empty else None, weights_RK, rows("logits"), rows("inputs"))


def _real_rows(passes: list[Pass]) -> Array | None:
    """Which rows of all passes are no padding; None if all are."""
    if all(one.keep_BS is None for one in passes):
        return None
    masks = (np.ones(one.shape, dtype=bool) if one.keep_BS is None else one.keep_BS for one in passes)
    return np.concatenate([mask.ravel() for mask in masks])


def _following(input_R: Array, row_R: Array, rows: int) -> Array:
    """The next token of the same sequence; unknown after the last one."""
    out_R = np.full(len(input_R), UNKNOWN, dtype=np.int64)
    for row in range(rows):
        (mine,) = np.nonzero(row_R == row)
        out_R[mine[:-1]] = input_R[mine[1:]]
    return out_R


def _digest(ids: Array) -> str:
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
