"""The same routing as another sequence of passes, and as sums."""

from collections import Counter
from dataclasses import replace

import numpy as np

from gangline.core.keys import ExpertKey
from gangline.traces.trace import Trace


def one_by_one(trace: Trace) -> Trace:
    """Return the trace as if every token had been decoded by itself, document after document.

    A causal model routes a token by what came before it, so the routing is what decoding the same text would
    have given; only the passes differ.
    """
    order = np.lexsort((trace.tokens.position, trace.tokens.doc))
    tokens = trace.tokens.take(order)
    tokens = replace(
        tokens,
        step=np.arange(len(tokens), dtype=np.int32),
        phase=np.ones(len(tokens), dtype=np.uint8),
    )
    layers = {number: trace.layer(number).take(order) for number in trace.layers}
    return Trace(trace.header, trace.documents, tokens, layers, name=trace.name)


def expert_tokens(trace: Trace) -> dict[ExpertKey, int]:
    """Return how many tokens chose each expert; experts that none chose are left out."""
    counts: Counter[ExpertKey] = Counter()
    for number in trace.layers:
        rows = trace.layer(number)
        chosen = rows.ids_RK if rows.keep_RK is None else rows.ids_RK[rows.keep_RK]
        found, times = np.unique(chosen, return_counts=True)
        pairs = zip(found.tolist(), times.tolist(), strict=True)
        counts.update({ExpertKey(number, expert): count for expert, count in pairs})
    return dict(counts)
