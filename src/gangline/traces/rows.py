"""Rows of a trace in memory: one per token, with what every layer decided for it.

Shape suffixes: R rows (tokens), K slots per token, N routed experts, D hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gangline.traces.header import TraceError, TraceHeader

Array = NDArray[Any]

PHASES = ("prefill", "decode")
UNKNOWN = -1
"""Value of ``input_id``, ``next_id`` and ``pred_id`` where the token is not known."""

_TOKEN_TYPES: dict[str, type] = {
    "input_id": np.int32,
    "next_id": np.int32,
    "pred_id": np.int32,
    "doc": np.int32,
    "position": np.int32,
    "step": np.int32,
    "phase": np.uint8,
    "is_special": np.bool_,
}
TOKEN_COLUMNS = tuple(_TOKEN_TYPES)


@dataclass(frozen=True)
class TokenTable:
    """What is known of each row besides its routing.

    Attributes:
        input_id: token that entered the model; ``next_id`` the one that followed; ``pred_id`` the likeliest
            by the model's own logits. -1 where unknown.
        doc: number of the document or request, ``position`` the place in it.
        step: number of the forward pass: rows of one pass form one event per layer.
        phase: 0 prefill, 1 decode.
        is_special: whether the tokenizer calls the token special.
        labels: for each kind of label its number in the header.
    """

    input_id: Array
    next_id: Array
    pred_id: Array
    doc: Array
    position: Array
    step: Array
    phase: Array
    is_special: Array
    labels: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_id)

    def take(self, rows: Any) -> "TokenTable":
        """Return the rows that an index or a mask picks."""
        columns = {name: getattr(self, name)[rows] for name in TOKEN_COLUMNS}
        return TokenTable(**columns, labels={kind: values[rows] for kind, values in self.labels.items()})


@dataclass(frozen=True)
class LayerRows:
    """Routing of one layer.

    Attributes:
        ids_RK: chosen experts; 0 in a slot that holds none.
        keep_RK: which slots hold an expert; None if all do.
        weights_RK: mixing weights (fp16), where the trace has them; 0 in an empty slot.
        logits_RN: the router's logits (fp16), ``inputs_RD`` the router's input (fp16), where recorded.
    """

    ids_RK: Array
    keep_RK: Array | None = None
    weights_RK: Array | None = None
    logits_RN: Array | None = None
    inputs_RD: Array | None = None

    def take(self, rows: Any) -> "LayerRows":
        """Return the rows that an index or a mask picks."""
        picked = [None if value is None else value[rows] for name, value in self.arrays() if name != "ids_RK"]
        return LayerRows(self.ids_RK[rows], *picked)

    def arrays(self) -> Iterator[tuple[str, Array | None]]:
        """Yield the arrays by name."""
        for name in ("ids_RK", "keep_RK", "weights_RK", "logits_RN", "inputs_RD"):
            yield name, getattr(self, name)


def id_type(experts: int) -> type:
    """The smallest type that holds expert ids."""
    return np.uint8 if experts <= 256 else np.uint16


def to_arrays(tokens: TokenTable, layers: Sequence[LayerRows], header: TraceHeader) -> dict[str, Array]:
    """Name the columns of a shard; see ``docs/how-it-works/trace-format.md``."""
    out = {f"tokens.{name}": getattr(tokens, name).astype(kind) for name, kind in _TOKEN_TYPES.items()}
    out |= {f"labels.{kind}": values.astype(np.uint16) for kind, values in tokens.labels.items()}
    for number, rows in enumerate(layers):
        name = f"layer_{number:02d}"
        out[f"{name}.idx"] = rows.ids_RK.astype(id_type(header.layers[number].experts))
        if rows.keep_RK is not None:
            out[f"{name}.keep"] = np.packbits(rows.keep_RK, axis=1)
        for part, values in (("w", rows.weights_RK), ("z", rows.logits_RN), ("x", rows.inputs_RD)):
            if values is not None:
                out[f"{name}.{part}"] = values.astype(np.float16)
    return {name: np.ascontiguousarray(values) for name, values in out.items()}


def tokens_of(shard: Mapping[str, Array], where: str) -> TokenTable:
    """Read the token columns of a shard.

    Raises:
        TraceError: one is missing, or they differ in length.
    """
    missing = [name for name in TOKEN_COLUMNS if f"tokens.{name}" not in shard]
    if missing:
        raise TraceError(f"{where} lacks the columns {', '.join(missing)}; record the trace again")
    labels = {
        name.removeprefix("labels."): values for name, values in shard.items() if name.startswith("labels.")
    }
    table = TokenTable(**{name: shard[f"tokens.{name}"] for name in TOKEN_COLUMNS}, labels=labels)
    columns = [getattr(table, name) for name in TOKEN_COLUMNS] + list(labels.values())
    if any(column.shape != (len(table),) for column in columns):
        raise TraceError(f"{where}: token columns differ in length; record the trace again")
    return table


def layer_of(shard: Mapping[str, Array], number: int, header: TraceHeader, where: str) -> LayerRows:
    """Read one layer of a shard.

    Raises:
        TraceError: it is missing, has another shape, or names an expert that the layer does not have.
    """
    name, layer = f"layer_{number:02d}", header.layers[number]
    ids_RK = shard.get(f"{name}.idx")
    if ids_RK is None or ids_RK.ndim != 2 or ids_RK.shape[1] != layer.top_k:
        raise TraceError(
            f"{where}: layer {number} must hold ids [rows, {layer.top_k}]; record the trace again"
        )
    if ids_RK.size and int(ids_RK.max()) >= layer.experts:
        raise TraceError(
            f"{where}: layer {number} names expert {int(ids_RK.max())} of {layer.experts}; record again"
        )
    keep = shard.get(f"{name}.keep")
    return LayerRows(
        ids_RK,
        None if keep is None else np.unpackbits(keep, axis=1, count=layer.top_k).astype(bool),
        shard.get(f"{name}.w"),
        shard.get(f"{name}.z"),
        shard.get(f"{name}.x"),
    )


def join_tokens(parts: Sequence[TokenTable]) -> TokenTable:
    """Put tables with the same kinds of labels one after another."""
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in TOKEN_COLUMNS}
    kinds = parts[0].labels if parts else {}
    labels = {kind: np.concatenate([part.labels[kind] for part in parts]) for kind in kinds}
    return TokenTable(**columns, labels=labels)


def join_layers(parts: Sequence[LayerRows]) -> LayerRows:
    """Put rows of one layer one after another; where any part has empty slots, all say which are full."""
    joined: dict[str, Array | None] = {}
    some_empty = any(part.keep_RK is not None for part in parts)
    for name, first in parts[0].arrays():
        if name == "keep_RK":
            keeps = [np.ones(p.ids_RK.shape, dtype=bool) if p.keep_RK is None else p.keep_RK for p in parts]
            joined[name] = np.concatenate(keeps) if some_empty else None
        else:
            joined[name] = None if first is None else np.concatenate([getattr(p, name) for p in parts])
    return LayerRows(**joined)  # type: ignore[arg-type]
