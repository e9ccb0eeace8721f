"""Read a trace: its rows, or the routing events that a cache would have seen.

Shape suffixes: R rows (tokens), T tokens of one event, K slots per token, N routed experts.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gangline.core.events import Need, Phase, RoutingDetail, RoutingEvent
from gangline.traces.header import TraceError, TraceHeader, read_header
from gangline.traces.rows import Array, LayerRows, TokenTable, join_layers, join_tokens, layer_of, tokens_of
from gangline.traces.shards import Document, read_arrays, read_documents, shard_paths

_DETAILS = ("ids", "weights", "scores", "gate_input", "token_ids", "requests")


class Trace:
    """Rows in the order of computation. Layers are read from disk when they are first asked for.

    Attributes:
        header: what the trace says about itself.
        documents: its documents.
        tokens: what is known of each row besides routing.
        name: where it lies, for messages.
    """

    def __init__(
        self,
        header: TraceHeader,
        documents: Sequence[Document],
        tokens: TokenTable,
        layers: dict[int, LayerRows],
        *,
        paths: Sequence[Path] = (),
        name: str = "trace",
    ) -> None:
        self.header = header
        self.documents = tuple(documents)
        self.tokens = tokens
        self.name = name
        self._layers = layers
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.tokens)

    def layer(self, number: int) -> LayerRows:
        """Return the routing of one layer.

        Raises:
            TraceError: a shard is damaged.
        """
        if number not in self._layers:
            parts = [
                layer_of(read_arrays(path, [f"layer_{number:02d}."]), number, self.header, str(path))
                for path in self._paths
            ]
            rows = join_layers(parts)
            if len(rows.ids_RK) != len(self):
                raise TraceError(
                    f"{self.name}: layer {number} has {len(rows.ids_RK)} rows for {len(self)} tokens; "
                    "record the trace again"
                )
            self._layers[number] = rows
        return self._layers[number]

    @property
    def layers(self) -> range:
        """Indices of the MoE layers."""
        return range(len(self.header.layers))

    def select(
        self, *, phase: Phase | None = None, documents: Collection[int] | None = None, rows: Any = None
    ) -> "Trace":
        """Return the rows of one phase, of some documents, or those that a mask picks.

        Raises:
            TraceError: nothing is left.
        """
        mask = np.ones(len(self), dtype=bool)
        if rows is not None:
            mask &= np.asarray(rows, dtype=bool)
        if phase is not None:
            mask &= self.tokens.phase == (1 if phase == "decode" else 0)
        if documents is not None:
            mask &= np.isin(self.tokens.doc, list(documents))
        if not mask.any():
            what = f" in phase {phase}" if phase else ""
            raise TraceError(f"{self.name} has no such rows{what}; record others or ask for all")
        if mask.all():
            return self
        layers = {number: self.layer(number).take(mask) for number in self.layers}
        kept = [d for d in self.documents if documents is None or d.number in documents]
        return Trace(self.header, kept, self.tokens.take(mask), layers, name=self.name)

    @cached_property
    def passes(self) -> list[slice]:
        """The rows of each forward pass, in order."""
        starts = np.flatnonzero(np.diff(self.tokens.step, prepend=self.tokens.step[:1] - 1))
        return [slice(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def events(self, needs: Collection[Need] = ()) -> Iterator[RoutingEvent]:
        """Yield one event per forward pass and layer, in the order in which the model made them.

        Args:
            needs: what events must carry beyond counts.

        Raises:
            TraceError: the trace was recorded without something that is needed.
        """
        wanted = [need for need in _DETAILS if need in needs]
        layers = [self.layer(number) for number in self.layers]
        scores = [self.scores(number) for number in self.layers] if "scores" in wanted else []
        for need in wanted:
            self._require(need, layers)
        for rows in self.passes:
            step = int(self.tokens.step[rows.start])
            phase: Phase = "decode" if self.tokens.phase[rows.start] == 1 else "prefill"
            for number, layer in enumerate(layers):
                experts, counts = _distinct(layer, rows)
                detail = self._detail(rows, number, layer, scores, wanted) if wanted else None
                tokens = rows.stop - rows.start
                yield RoutingEvent(step, number, phase, tokens, experts, counts, detail)

    def _require(self, need: str, layers: Sequence[LayerRows]) -> None:
        first = layers[0]
        lacks = {
            "weights": first.weights_RK is None and "record with --mode full",
            "scores": first.logits_RN is None and "record with --logits",
            "gate_input": first.inputs_RD is None and "record with --inputs",
        }.get(need)
        if lacks:
            raise TraceError(f"{self.name} holds no {need.replace('_', ' ')}, which is needed here; {lacks}")

    def scores(self, number: int) -> Array | None:
        """Return ``[R, N]``: all experts' scores by the family's rule; None where no logits were recorded."""
        logits = self.layer(number).logits_RN
        if logits is None:
            return None
        z_RN = logits.astype(np.float32)
        if self.header.layers[number].score == "sigmoid":
            return np.asarray(1 / (1 + np.exp(-z_RN)))
        e_RN = np.exp(z_RN - z_RN.max(axis=1, keepdims=True))
        return np.asarray(e_RN / e_RN.sum(axis=1, keepdims=True))

    def _detail(
        self,
        rows: slice,
        number: int,
        layer: LayerRows,
        scores: Sequence[Array | None],
        wanted: Collection[str],
    ) -> RoutingDetail:
        def part(need: str, values: Array | None) -> Array | None:
            return values[rows] if need in wanted and values is not None else None

        return RoutingDetail(
            ids_TK=part("ids", layer.ids_RK),
            weights_TK=part("weights", layer.weights_RK),
            scores_TE=part("scores", scores[number] if scores else None),
            gate_input_TD=part("gate_input", layer.inputs_RD),
            token_ids_T=part("token_ids", self.tokens.input_id),
            requests_T=part("requests", self.tokens.doc),
        )

    def with_header(self, **changes: Any) -> "Trace":
        """Return the same rows under a header with other values."""
        header = replace(self.header, **changes)
        return Trace(header, self.documents, self.tokens, self._layers, paths=self._paths, name=self.name)


def open_trace(folder: Path | str) -> Trace:
    """Open a trace in mode ``full`` or ``ids``; one whose recording broke off gives what was written.

    Raises:
        TraceError: there is none, it is damaged, or it holds sums only.
    """
    folder = Path(folder)
    header = read_header(folder)
    if header.mode == "counts":
        raise TraceError(
            f"{folder} holds sums only (mode counts), no single tokens; record with --mode ids or full"
        )
    paths = shard_paths(folder)
    if not paths:
        raise TraceError(f"{folder} holds no rows yet; record it again or resume it")
    tokens = join_tokens([tokens_of(read_arrays(path, ["tokens.", "labels."]), str(path)) for path in paths])
    documents = [document for path in paths for document in read_documents(path)]
    return Trace(header, documents, tokens, {}, paths=paths, name=str(folder))


def _distinct(layer: LayerRows, rows: slice) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Distinct experts of some rows, ascending, and the tokens of each."""
    ids_TK = layer.ids_RK[rows]
    if layer.keep_RK is None and len(ids_TK) == 1:
        experts = sorted(set(ids_TK[0].tolist()))
        return tuple(experts), (1,) * len(experts)
    chosen = ids_TK.ravel() if layer.keep_RK is None else ids_TK[layer.keep_RK[rows]]
    found, counts = np.unique(chosen, return_counts=True)
    return tuple(found.tolist()), tuple(counts.tolist())
