"""Traces made up for tests: no model needed."""

import numpy as np

from gangline.core.events import RoutingEvent
from gangline.traces.header import TraceHeader, TraceLayer


def made_header(layers, experts, top_k, *, mode="full", expert_bytes=1000):
    """Return a header with ``layers`` equal layers."""
    made = tuple(TraceLayer(f"layer.{n}", experts, top_k, 16, 8, expert_bytes) for n in range(layers))
    return TraceHeader("made", "made", made, mode=mode)


def made_ids(rng, rows, layers, experts, top_k):
    """Return random ids ``[rows, layers, K]`` without an expert twice for one token."""
    order = rng.random((rows, layers, experts)).argsort(axis=-1)
    return order[..., :top_k].astype(np.int16)


def made_events(steps):
    """Return events from ``steps[step][layer] = experts``; more than ``top_k`` tokens is not told apart."""
    return [
        RoutingEvent(step, layer, "decode", 1, tuple(sorted(experts)), (1,) * len(experts))
        for step, layers in enumerate(steps)
        for layer, experts in enumerate(layers)
    ]
