"""What all statistics need: entropies, divergences, intervals, and which findings are more than chance."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array


@dataclass(frozen=True)
class Null:
    """What a statistic is where there is nothing to find.

    Attributes:
        what: how the null was made, in words.
        mean: of its draws.
        low, high: between which 95% of the draws lie.
        p_value: share of draws at least as extreme as the real value, never below ``1 / (draws + 1)``.
        draws: how many.
    """

    what: str
    mean: float
    low: float
    high: float
    p_value: float
    draws: int


def against(value: float, draws: Array, what: str) -> Null:
    """Compare a value with draws of its null; larger is more extreme."""
    low, high = np.quantile(draws, [0.025, 0.975])
    beyond = int(np.sum(draws >= value - 1e-12))
    p_value = (1 + beyond) / (1 + len(draws))
    return Null(what, float(draws.mean()), float(low), float(high), p_value, len(draws))


def interval(draws: Array) -> tuple[float, float]:
    """Return the 95% interval of bootstrap draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def resampled(documents: int, draws: int, rng: Generator) -> Array:
    """Return ``[draws, documents]``: how often each document is drawn in a bootstrap over documents."""
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=draws)


def entropy(p_N: Array, axis: int = -1) -> Array:
    """Return Shannon's entropy in nats of distributions along ``axis``."""
    safe = np.where(p_N > 0, p_N, 1.0)
    return np.asarray(-(p_N * np.log(safe)).sum(axis=axis))


def jensen_shannon(p_N: Array, q_N: Array) -> Array:
    """Return the Jensen-Shannon divergence in nats, along the last axis; at most ``log 2``."""
    divergence = entropy((p_N + q_N) / 2) - (entropy(p_N) + entropy(q_N)) / 2
    return np.maximum(divergence, 0.0)


def discoveries(p_values: Array, rate: float = 0.05) -> Array:
    """Return which hypotheses to reject so that about ``rate`` of those are false.

    Benjamini and Hochberg, "Controlling the false discovery rate" (Journal of the Royal Statistical Society
    B, 1995).
    """
    order = np.argsort(p_values)
    passes = p_values[order] <= rate * np.arange(1, len(p_values) + 1) / len(p_values)
    last = int(np.flatnonzero(passes)[-1]) + 1 if passes.any() else 0
    found = np.zeros(len(p_values), dtype=bool)
    found[order[:last]] = True
    return found
