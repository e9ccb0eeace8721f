"""The same routing as another sequence of passes."""

from dataclasses import replace

import numpy as np

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
