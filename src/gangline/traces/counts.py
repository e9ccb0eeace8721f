"""Sums over a trace in constant memory: how often each expert was used, and which experts together.

Shape suffixes: P phases (prefill, decode), B labels, N routed experts, R rows, K slots.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gangline.traces.files import write_whole
from gangline.traces.header import TraceError, TraceHeader
from gangline.traces.rows import PHASES, Array, LayerRows, TokenTable

COUNTS = "counts.safetensors"


class RoutingCounts:
    """Sums of routed rows.

    Attributes:
        documents: documents counted.
        tokens_PB: rows by phase and label (``label_kind`` of the header; label 0 if there is none).
        load: for each layer ``[P, B, N]``, slots that chose expert n.
        together: for each layer ``[N, N]``, rows that chose both experts; the diagonal counts single ones.
    """

    def __init__(self, header: TraceHeader, label_kind: str | None = None) -> None:
        self.label_kind = label_kind
        self.documents = 0
        self.tokens_PB = np.zeros((len(PHASES), 1), dtype=np.int64)
        self.load = [np.zeros((len(PHASES), 1, n), dtype=np.int64) for n in header.experts]
        self.together = [np.zeros((n, n), dtype=np.int64) for n in header.experts]

    def add(self, tokens: TokenTable, layers: Sequence[LayerRows], documents: int) -> None:
        """Add rows."""
        label_R = tokens.labels.get(self.label_kind or "", np.zeros(len(tokens), dtype=np.int64))
        self._grow(int(label_R.max(initial=0)) + 1)
        np.add.at(self.tokens_PB, (tokens.phase, label_R), 1)
        for rows, load_PBN, together_NN in zip(layers, self.load, self.together, strict=True):
            keep_RK = np.ones(rows.ids_RK.shape, dtype=bool) if rows.keep_RK is None else rows.keep_RK
            row_S, slot_S = np.nonzero(keep_RK)
            expert_S = rows.ids_RK[row_S, slot_S]
            np.add.at(load_PBN, (tokens.phase[row_S], label_R[row_S], expert_S), 1)
            used_RN = np.zeros((len(tokens), load_PBN.shape[2]), dtype=np.float32)
            used_RN[row_S, expert_S] = 1
            together_NN += np.rint(used_RN.T @ used_RN).astype(np.int64)
        self.documents += documents

    def _grow(self, labels: int) -> None:
        missing = labels - self.tokens_PB.shape[1]
        if missing > 0:
            self.tokens_PB = np.pad(self.tokens_PB, ((0, 0), (0, missing)))
            self.load = [np.pad(load, ((0, 0), (0, missing), (0, 0))) for load in self.load]

    def save(self, folder: Path) -> None:
        """Write the sums in one step."""
        arrays: dict[str, Array] = {"tokens": self.tokens_PB, "documents": np.array([self.documents])}
        for number, (load, together) in enumerate(zip(self.load, self.together, strict=True)):
            arrays |= {f"layer_{number:02d}.load": load, f"layer_{number:02d}.together": together}
        metadata = {"label_kind": self.label_kind or ""}
        write_whole(folder / COUNTS, lambda path: save_file(arrays, path, metadata=metadata))


def load_counts(folder: Path, header: TraceHeader, label_kind: str | None = None) -> RoutingCounts:
    """Read the sums of a trace in mode ``counts``.

    Raises:
        TraceError: they are missing or do not fit the header.
    """
    counts = RoutingCounts(header, label_kind)
    try:
        arrays = load_file(folder / COUNTS)
        counts.tokens_PB, counts.documents = arrays["tokens"], int(arrays["documents"][0])
        counts.load = [arrays[f"layer_{n:02d}.load"] for n in range(len(header.layers))]
        counts.together = [arrays[f"layer_{n:02d}.together"] for n in range(len(header.layers))]
    except (OSError, SafetensorError, KeyError) as error:
        raise TraceError(f"{folder / COUNTS} cannot be read ({error}); record the trace again") from error
    sizes = [load.shape[2] for load in counts.load]
    if sizes != list(header.experts):
        raise TraceError(f"{folder / COUNTS} counts {sizes} experts, its header says {list(header.experts)}")
    return counts
