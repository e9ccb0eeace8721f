"""HOBBIT's thresholds for a model, from a recorded trace, and the composition that takes them.

"HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference" (arXiv 2411.01433) takes T1 and T2
from the routers' weights on calibration text. How much of the experts may go in low precision or be left out
is the user's choice; the paper's on Mixtral is 67 % as they are, 30 % low, 3 % left out.

Shape suffixes: P choices of experts, over all tokens and layers.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gangline.core.errors import UsageError
from gangline.policies.precision.hobbit import fit_thresholds, unimportance
from gangline.traces import Trace
from gangline.traces.header import TraceError

_OFF = 0.05  # a share further than this from the asked one is worth a note


@dataclass(frozen=True)
class ThresholdFit:
    """Thresholds, and what they do on the trace they were fitted to.

    Attributes:
        model: of the trace, ``tokens`` its length.
        high, low: T1 and T2.
        asked: shares of expert choices in high precision, in low precision and left out, as asked.
        reached: the same on the trace.
        notes: what a user must know.
    """

    model: str
    tokens: int
    high: float
    low: float
    asked: tuple[float, float, float]
    reached: tuple[float, float, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def composition(self) -> str:
        """Return the text of a YAML file that ``--policy`` takes."""
        return (
            f"# HOBBIT for {self.model}, thresholds fitted to {self.tokens} recorded tokens.\n"
            f"# Of the choices of their routers: {self.words()}.\n"
            f"like: hobbit\nprecision:\n  name: HobbitPrecision\n  high: {self.high}\n  low: {self.low}\n"
        )

    def words(self) -> str:
        """Return what the thresholds do, in words."""
        high, low, skip = self.reached
        return f"{high:.1%} in full precision, {low:.1%} in low precision, {skip:.1%} left out"


def fit_to_trace(trace: Trace, high: float = 0.67, skip: float = 0.03) -> ThresholdFit:
    """Fit thresholds to the routers' weights of all tokens and layers of a trace.

    Args:
        trace: in mode ``full``.
        high: share of expert choices that stay in high precision.
        skip: share that is left out.

    Raises:
        UsageError: the shares cannot be, or the model has one expert a token.
        TraceError: the trace holds no weights.
    """
    if max(trace.header.top_k) < 2:
        raise UsageError(
            f"{trace.header.model} takes one expert a token, which HOBBIT's rule always keeps in high "
            "precision; there are no thresholds to fit"
        )
    parts = []
    for number in trace.layers:
        weights_RK = trace.layer(number).weights_RK
        if weights_RK is None:
            raise TraceError(
                f"{trace.name} holds no weights, from which thresholds follow; record with --mode full"
            )
        parts.append(unimportance(weights_RK))
    before_P = np.concatenate(parts)
    # Rounded up: a choice on a threshold is within it.
    t1, t2 = (math.ceil(value * 1e4 - 1e-6) / 1e4 for value in fit_thresholds(before_P, high, skip))
    asked = (high, max(0.0, 1 - high - skip), skip)
    reached = _shares(before_P, t1, t2)
    off = max(abs(want - got) for want, got in zip(asked, reached, strict=True))
    notes = (_degenerate(before_P, t1, asked, reached),) if off > _OFF else ()
    return ThresholdFit(trace.header.model, len(trace), t1, t2, asked, reached, notes)


def _shares(before_P: Any, t1: float, t2: float) -> tuple[float, float, float]:
    """Return the shares in high and low precision, and left out, by the rule's own comparison."""
    high, kept = (float((before_P <= limit + 1e-9).mean()) for limit in (t1, t2))
    return high, kept - high, 1 - kept


def _degenerate(
    before_P: Any, t1: float, asked: tuple[float, float, float], reached: tuple[float, float, float]
) -> str:
    """Say that many choices have one weight before them, so that no threshold parts them as asked."""
    alike = float((np.abs(before_P - t1) < 1e-3).mean())
    below = before_P[before_P < t1 - 1e-3]
    lower = f"; a T1 below {t1:g} would keep {len(below) / len(before_P):.0%}" if len(below) else ""
    nothing = ", so nothing changes under this file" if reached[0] > 1 - 1e-6 else ""
    return (
        f"{asked[0]:.0%} in full precision cannot be had: {alike:.0%} of the choices have the same weight "
        f"before them ({t1:g}), because the experts of a token weigh alike; T1 {t1:g} keeps "
        f"{reached[0]:.0%}{nothing}{lower}"
    )
