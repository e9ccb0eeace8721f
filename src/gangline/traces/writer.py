"""Append documents to a trace on disk. What is written survives a crash, and recording can go on after it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from gangline.traces.counts import COUNTS, RoutingCounts, load_counts
from gangline.traces.header import META, TraceError, TraceHeader, read_header, write_header
from gangline.traces.rows import LayerRows, TokenTable, join_layers, join_tokens, to_arrays
from gangline.traces.shards import Document, read_arrays, read_documents, shard_paths, write_shard

SHARD_ROWS = 2048


class TraceWriter:
    """Writes whole documents, so that no trace ever ends inside one.

    Documents are collected until a shard is full. ``flush`` writes what is there, ``close`` also marks the
    trace complete. In mode ``counts`` only the sums are kept, and written again at every flush.

    Args:
        folder: new or empty; with ``resume`` one that holds a trace of the same recording.
        header: of the trace.
        resume: go on after what is there.
        shard_rows: rows after which a shard is written.
        label_kind: the kind of label that ``counts`` tells apart.

    Attributes:
        documents: documents so far, those not flushed included: the number of the next one.
        tokens: rows so far.
        steps: forward passes so far.

    Raises:
        TraceError: the folder holds something else, or a trace of another recording.
    """

    def __init__(
        self,
        folder: Path,
        header: TraceHeader,
        *,
        resume: bool = False,
        shard_rows: int = SHARD_ROWS,
        label_kind: str | None = None,
    ) -> None:
        self.folder = folder
        self.header = replace(header, created=datetime.now(UTC).isoformat(timespec="seconds"))
        self.documents = self.tokens = self.steps = 0
        self._shard_rows = shard_rows
        self._shards = 0
        self._documents: list[Document] = []
        self._tokens: list[TokenTable] = []
        self._layers: list[list[LayerRows]] = []
        self._counts = RoutingCounts(header, label_kind) if header.mode == "counts" else None
        if (folder / META).is_file():
            self._continue(header, resume)
        elif folder.is_dir() and any(folder.iterdir()):
            raise TraceError(f"{folder} is not empty and holds no trace; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_header(folder, self.header)

    def _continue(self, header: TraceHeader, resume: bool) -> None:
        found = read_header(self.folder)
        if not resume:
            raise TraceError(f"{self.folder} holds a trace already; name a new folder, or resume it")
        differences = found.same_recording(header)
        if differences:
            raise TraceError(
                f"{self.folder} was recorded with another {', '.join(differences)}; name a new folder"
            )
        self.header = replace(found, complete=False)
        if self._counts is not None:
            if (self.folder / COUNTS).is_file():
                self._counts = load_counts(self.folder, found, self._counts.label_kind)
                self.documents = self._counts.documents
                self.tokens = int(self._counts.tokens_PB.sum())
            return
        paths = shard_paths(self.folder)
        self._shards = len(paths)
        for path in paths:
            known = read_documents(path)
            self.documents += len(known)
            self.tokens += sum(document.tokens for document in known)
        if paths:
            self.steps = int(read_arrays(paths[-1], ["tokens.step"])["tokens.step"].max(initial=-1)) + 1

    def label(self, kind: str, name: str) -> int:
        """Return the number of a label; a new one enters the header at the next flush."""
        self.header, number = self.header.with_label(kind, name)
        return number

    def add(self, documents: Sequence[Document], tokens: TokenTable, layers: Sequence[LayerRows]) -> None:
        """Append documents that were computed together.

        Args:
            documents: numbered on from ``self.documents``.
            tokens: their rows in the order of computation; ``doc`` and ``step`` count on from what is there.
            layers: one entry per layer, in order.
        """
        assert documents[0].number == self.documents and len(layers) == len(self.header.layers)
        self.documents += len(documents)
        self.tokens += len(tokens)
        self.steps = max(self.steps, int(tokens.step.max(initial=-1)) + 1)
        self._documents.extend(documents)
        self._tokens.append(tokens)
        self._layers.append(list(layers))
        if sum(map(len, self._tokens)) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write all documents that are still in memory, and the header."""
        if self._documents:
            tokens = join_tokens(self._tokens)
            layers = [join_layers(parts) for parts in zip(*self._layers, strict=True)]
            if self._counts is None:
                arrays = to_arrays(tokens, layers, self.header)
                write_shard(self.folder, self._shards, arrays, self._documents)
                self._shards += 1
            else:
                self._counts.add(tokens, layers, len(self._documents))
                self._counts.save(self.folder)
            self._documents, self._tokens, self._layers = [], [], []
        write_header(self.folder, self.header)

    def close(self, *, complete: bool = True) -> None:
        """Write everything and say whether recording came to its end."""
        self.header = replace(self.header, complete=complete)
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(complete=error is None)
