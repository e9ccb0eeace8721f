"""The traces of a report as one body of routing: whose model, which rows, which groups, what is missing.

Shape suffixes: R rows, N experts, D documents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from gangline.core.errors import UsageError
from gangline.traces import RoutingCounts, Trace, TraceHeader, load_counts, open_trace, read_header
from gangline.traces.expert_outputs import ExpertOutputs, load_expert_outputs
from gangline.traces.rows import Array, join_layers, join_tokens
from gangline.traces.statistics.membership import numbered, used

TOKENS = 16_384
"""Rows that statistics look at, unless told otherwise."""
_GROUP_KINDS = ("domain", "lang", "task")
_NO_GROUP = ("pair",)


@dataclass
class Study:
    """What a report is about.

    Attributes:
        header: of the traces (of the last checkpoint, if there are several).
        trace: their rows, document after document; None if all of them hold sums only.
        recorded: rows before whole documents were left out to keep to a limit.
        counts: sums of the traces that hold nothing else, by name.
        earlier: traces of other checkpoints, by name, in the order of training.
        group_kind: what groups are: a kind of label, or ``trace``; None with one group.
        groups: their names.
        parallel: rows of the traces whose documents are translations of each other (labels lang and pair).
        words: turns a token id into text; None without a tokenizer.
        outputs: measured expert outputs.
        simulations: results of the simulator, plain data, first those of the curve.
        seed: of every draw.
        notes: what was done to the traces.
    """

    header: TraceHeader
    trace: Trace | None
    recorded: int = 0
    counts: dict[str, RoutingCounts] = field(default_factory=dict)
    earlier: dict[str, Trace] = field(default_factory=dict)
    group_kind: str | None = None
    groups: tuple[str, ...] = ()
    parallel: Trace | None = None
    words: Callable[[int], str] | None = None
    outputs: ExpertOutputs | None = None
    simulations: Sequence[Mapping[str, Any]] = ()
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    _used: dict[int, Array] = field(default_factory=dict)

    def rng(self, *number: int) -> Generator:
        """Return a generator of its own for each use, so that sections do not move each other's draws."""
        return np.random.default_rng([self.seed, *number])

    @property
    def rows(self) -> Trace:
        """The rows; only where there are some."""
        assert self.trace is not None
        return self.trace

    @property
    def layers(self) -> range:
        """Indices of the MoE layers."""
        return range(len(self.header.layers))

    @property
    def chance(self) -> float:
        """K/N, averaged over layers."""
        return float(np.mean([layer.top_k / layer.experts for layer in self.header.layers]))

    def used(self, layer: int) -> Array:
        """Return ``[R, N]``: experts of each row."""
        if layer not in self._used:
            self._used[layer] = used(self.rows.layer(layer), self.header.layers[layer].experts)
        return self._used[layer]

    @cached_property
    def doc_R(self) -> Array:
        """Document of each row, numbered from 0."""
        return numbered(self.rows.tokens.doc)[0]

    @cached_property
    def group_R(self) -> Array:
        """Group of each row."""
        if self.group_kind is None:
            return np.zeros(len(self.rows), dtype=np.int64)
        return self.rows.tokens.labels[self.group_kind].astype(np.int64)

    @cached_property
    def group_D(self) -> Array:
        """Group of each document."""
        _, first_D = np.unique(self.doc_R, return_index=True)
        return np.asarray(self.group_R[first_D])

    def load(self, layer: int) -> Array:
        """Return ``[N]``: choices of each expert, in rows and in sums."""
        total = np.zeros(self.header.layers[layer].experts, dtype=np.int64)
        if self.trace is not None:
            total += self.used(layer).sum(axis=0)
        for counts in self.counts.values():
            total += counts.load[layer].sum(axis=(0, 1))
        return total


def open_study(
    folders: Sequence[Path], *, group: str | None = None, tokens: int = TOKENS, seed: int = 0
) -> Study:
    """Read traces for a report.

    Args:
        folders: of traces. Those of another checkpoint than the last one's serve comparisons only.
        group: kind of label that parts the texts, or ``trace``; by default what the traces offer.
        tokens: whole documents are left out, evenly over the groups, to keep to about so many rows.
        seed: of every draw.

    Raises:
        TraceError: a folder holds no trace, or it is damaged.
        UsageError: the traces are of models with different layers, or have no labels of the kind.
    """
    headers = [read_header(folder) for folder in folders]
    names = _names(folders)
    last = headers[-1]
    for name, header in zip(names, headers, strict=True):
        if (header.experts, header.top_k) != (last.experts, last.top_k):
            raise UsageError(
                f"{name} has layers of {_sizes(header)} experts, {names[-1]} of {_sizes(last)}: these are "
                "different models; report each by itself"
            )
    study = Study(last, None, seed=seed)
    rows: dict[str, Trace] = {}
    for name, folder, header in zip(names, folders, headers, strict=True):
        if not header.complete:
            study.notes.append(f"{name}: the recording broke off; what was written is used.")
        if header.mode == "counts":
            study.counts[name] = load_counts(folder, header)
        elif (header.model, header.revision) == (last.model, last.revision):
            rows[name] = open_trace(folder)
        else:
            study.earlier[name] = open_trace(folder)
        study.outputs = load_expert_outputs(folder) or study.outputs
    if rows:
        whole = _joined(rows)
        parallel = {name: one for name, one in rows.items() if {"lang", "pair"} <= set(one.header.labels)}
        study.parallel = _joined(parallel) if parallel else None
        study.group_kind = _group_kind(whole, group)
        study.groups = whole.header.labels.get(study.group_kind or "", ("all",))
        study.recorded = len(whole)
        study.trace = sample(whole, study.group_kind, tokens)
        if len(study.trace) < len(whole):
            study.notes.append(
                f"Statistics use {len(study.trace):,} of {len(whole):,} recorded tokens: whole documents, "
                "taken from the groups in turn (--tokens)."
            )
    if study.counts:
        study.notes.append(
            f"{', '.join(study.counts)}: sums only (mode counts), so they enter the load and nothing else."
        )
    if study.earlier:
        study.notes.append(
            f"{', '.join(study.earlier)}: other checkpoints than {names[-1]}'s, used for early learning only."
        )
    return study


def sample(trace: Trace, kind: str | None, tokens: int, most: int | None = None) -> Trace:
    """Return whole documents, taken from the groups in turn, up to a number of tokens.

    Args:
        trace: rows, document after document.
        kind: of label that parts the groups.
        tokens: to keep to; at least one document stays.
        most: documents to take at most.
    """
    docs, first_D, counts_D = np.unique(trace.tokens.doc, return_index=True, return_counts=True)
    group_D = trace.tokens.labels[kind][first_D] if kind else np.zeros(len(docs), dtype=np.int64)
    turn_D = np.zeros(len(docs), dtype=np.int64)
    for group in np.unique(group_D):
        mine = np.flatnonzero(group_D == group)
        turn_D[mine] = np.arange(len(mine))
    order = np.lexsort((group_D, turn_D))[:most]
    fits = np.cumsum(counts_D[order]) <= tokens
    fits[0] = True
    return trace.select(documents=docs[order[fits]].tolist())


def _joined(traces: Mapping[str, Trace]) -> Trace:
    """All rows one after another, sorted by document and position, labelled with the trace they come from."""
    parts = list(traces.values())
    shared = set.intersection(*(set(part.header.labels) for part in parts)) - {"trace"}
    header = replace(parts[0].header, labels={"trace": tuple(traces)})
    tokens, documents, before = [], [], 0
    for number, part in enumerate(parts):
        labels: dict[str, Array] = {"trace": np.full(len(part), number)}
        for kind in sorted(shared):
            to = []
            for name in part.header.labels[kind]:
                header, place = header.with_label(kind, name)
                to.append(place)
            labels[kind] = np.array(to)[part.tokens.labels[kind]]
        tokens.append(replace(part.tokens, doc=part.tokens.doc + before, labels=labels))
        documents += [replace(one, number=one.number + before) for one in part.documents]
        before += int(part.tokens.doc.max()) + 1
    table = join_tokens(tokens)
    order = np.lexsort((table.position, table.doc))
    layers = {}
    for number in parts[0].layers:
        rows = [part.layer(number) for part in parts]
        optional = ("weights_RK", "logits_RN", "inputs_RD")
        lacking: dict[str, Any] = {
            name: None for name in optional if any(getattr(one, name) is None for one in rows)
        }
        layers[number] = join_layers([replace(one, **lacking) for one in rows]).take(order)
    return Trace(header, documents, table.take(order), layers, name=", ".join(traces))


def _group_kind(trace: Trace, wanted: str | None) -> str | None:
    labels = {kind: names for kind, names in trace.header.labels.items() if kind not in _NO_GROUP}
    if wanted is not None:
        if wanted not in labels:
            raise UsageError(f"the traces share no label {wanted!r}; they have {', '.join(labels)}")
        return wanted if len(labels[wanted]) > 1 else None
    several = [kind for kind, names in labels.items() if len(names) > 1]
    return next((kind for kind in (*_GROUP_KINDS, "trace", *several) if kind in several), None)


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _sizes(header: TraceHeader) -> str:
    return f"{len(header.layers)} x {'/'.join(map(str, sorted(set(header.experts))))}"
