"""Traces on disk, made up: no model needed."""

import hashlib
from dataclasses import replace

import numpy as np

from gangline.traces import Document, LayerRows, TokenTable, TraceWriter
from traces.made import made_header, made_ids

LAYERS, N, K = 3, 8, 2


def token_table(docs, tokens, vocabulary, rng, *, decode_from=None, labels=None):
    """Rows of ``docs`` documents of ``tokens`` tokens; every document is one pass."""
    rows = docs * tokens
    position = np.tile(np.arange(tokens), docs)
    doc = np.repeat(np.arange(docs), tokens)
    input_id = rng.integers(vocabulary, size=rows).astype(np.int32)
    phase = (
        np.zeros(rows, dtype=np.uint8) if decode_from is None else (position >= decode_from).astype(np.uint8)
    )
    unknown = np.full(rows, -1, dtype=np.int32)
    next_id = np.where(position == tokens - 1, -1, np.roll(input_id, -1)).astype(np.int32)
    special = position == 0
    step = doc.astype(np.int32)
    return TokenTable(
        input_id,
        next_id,
        unknown,
        doc.astype(np.int32),
        position.astype(np.int32),
        step,
        phase,
        special,
        labels or {},
    )


def write_trace(
    folder,
    rng,
    *,
    docs=8,
    tokens=40,
    vocabulary=12,
    route=None,
    labels=None,
    model="made",
    mode="full",
    logits=False,
    inputs=False,
    decode_from=None,
):
    """Write a trace and return its folder.

    ``route(table, layer) -> ids [rows, K]`` (default: random); ``labels``: for each document, kind and name.
    """
    header = replace(made_header(LAYERS, N, K, mode=mode), model=model, source="text")
    labels = labels or [{}] * docs
    kinds = sorted(labels[0])
    kind = kinds[0] if kinds and mode == "counts" else None
    with TraceWriter(folder, header, label_kind=kind) as writer:
        columns = {
            kind: np.repeat([writer.label(kind, one[kind]) for one in labels], tokens) for kind in kinds
        }
        table = token_table(docs, tokens, vocabulary, rng, decode_from=decode_from, labels=columns)
        documents = [
            Document(d, f"text {d}", tokens, digest(table.input_id[table.doc == d]), labels[d])
            for d in range(docs)
        ]
        rows = [made_rows(rng, table, n, route, logits=logits, inputs=inputs) for n in range(LAYERS)]
        writer.add(documents, table, rows)
    return folder


def digest(ids):
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()


def made_rows(rng, table, layer, route, *, logits, inputs):
    ids = made_ids(rng, len(table), 1, N, K)[:, 0] if route is None else route(table, layer)
    z = None
    if logits:
        z = rng.normal(size=(len(table), N))
        np.put_along_axis(z, ids.astype(int), 5.0, axis=1)
    x = rng.normal(size=(len(table), 16)).astype(np.float16) if inputs else None
    weights = np.sort(rng.random(ids.shape), axis=1)[:, ::-1].astype(np.float16)
    return LayerRows(ids.astype(np.uint8), None, weights, z, x)


def by_token(table, layer):
    """A router that looks at the token only."""
    first = (table.input_id + layer) % N
    return np.stack([first, (first + 1) % N], axis=1)
