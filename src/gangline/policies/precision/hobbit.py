"""HOBBIT's token-level rule: high precision, low precision or nothing on a miss. Approximate.

"HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference" (arXiv 2411.01433). Sort a
token's experts by gate weight, normalised to sum 1. The unimportance of a rank is the weight before it. Up
to T1 the expert is loaded in high precision, up to T2 in low precision, beyond that it is skipped; the first
is always high. A copy that is there and good enough is used as it is. Thresholds are per model (Mixtral: 0.6
and 0.9): :func:`fit_thresholds` finds them.

Shape suffixes: T tokens, K chosen experts per token, P choices.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.precision import Precision
from gangline.policies.precision.protocol import PrecisionPolicy


class HobbitPrecision(PrecisionPolicy):
    """Chooses by the weight that goes before.

    Args:
        high: T1. 1 or more is exact.
        low: T2; experts beyond it are skipped.
        renormalise: let the weights of a token that lost an expert sum to what they were; the paper keeps the
            original weights.
    """

    needs = frozenset({"ids", "weights"})

    def __init__(self, high: float = 0.6, low: float = 0.9, *, renormalise: bool = False) -> None:
        if not 0 <= high <= low:
            raise UsageError(f"HOBBIT needs 0 <= T1 <= T2, not T1 {high} and T2 {low}")
        self.high, self.low, self.renormalise = high, low, renormalise
        self.exact = high >= 1

    def by_weight(self, weights_K: Sequence[float]) -> list[Precision]:
        """Return the precision of each of one token's experts, in the order given."""
        order = sorted(range(len(weights_K)), key=lambda i: (-weights_K[i], i))
        total, before = sum(weights_K), 0.0
        out = [Precision.HIGH] * len(weights_K)
        for rank, i in enumerate(order):
            share = before / total if total else 0.0
            # Sums of a few floats: a threshold that is met on paper is met here.
            if rank and share > self.high + 1e-9:
                out[i] = Precision.LOW if share <= self.low + 1e-9 else Precision.SKIP
            before += weights_K[i]
        return out

    def choose(self, event: RoutingEvent, resident: Mapping[int, Precision]) -> dict[int, Precision]:
        """Return the best precision that any token of the event wants, or the resident copy if it is better.

        Raises:
            UsageError: the event carries no ids or weights.
        """
        if event.detail is None or event.detail.ids_TK is None or event.detail.weights_TK is None:
            raise UsageError("HOBBIT's precision rule needs ids and weights of each token with the event")
        out = dict.fromkeys(event.experts, Precision.SKIP)
        for ids_K, weights_K in zip(
            event.detail.ids_TK.tolist(), event.detail.weights_TK.tolist(), strict=True
        ):
            for expert, wanted in zip(ids_K, self.by_weight(weights_K), strict=True):
                out[expert] = max(out[expert], wanted)
        return {expert: max(wanted, resident.get(expert, Precision.SKIP)) for expert, wanted in out.items()}

    def reweighted(self, weights_K: Sequence[float], kept_K: Sequence[bool]) -> list[float]:
        """Return a token's weights with skipped experts at 0, by the ``renormalise`` flag."""
        weights = np.asarray(weights_K, dtype=np.float64)
        left = weights * np.asarray(kept_K)
        if self.renormalise and left.sum() > 0:
            left = left * (weights.sum() / left.sum())
        return [float(w) for w in left]


def unimportance(weights_TK: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the share of weight before each choice of each token, ``[P]``; choices of weight 0 are none."""
    sorted_TK = -np.sort(-np.asarray(weights_TK, dtype=np.float64), axis=1)
    sorted_TK = sorted_TK[sorted_TK[:, 0] > 0]
    sorted_TK /= sorted_TK.sum(axis=1, keepdims=True)
    before_TK = np.cumsum(sorted_TK, axis=1) - sorted_TK
    before_P: NDArray[np.float64] = before_TK[sorted_TK > 0]
    return before_P


def fit_thresholds(before_P: NDArray[np.float64], high: float, skip: float) -> tuple[float, float]:
    """Return ``(T1, T2)`` so that a share ``high`` of expert choices stays HIGH and ``skip`` is skipped.

    Args:
        before_P: :func:`unimportance` of choices on calibration text, one or more.
        high: share of choices in high precision (Mixtral in the paper: 0.67).
        skip: share of choices left out (0.03); with 0 nothing is ever skipped.

    Raises:
        UsageError: the shares are none, or more than all together.
    """
    if not (0 < high <= 1 and 0 <= skip <= 1 and high + skip <= 1 + 1e-9):
        raise UsageError(
            f"shares of {high:g} in high precision and {skip:g} left out must be at least 0, with some in "
            "high precision, and no more than 1 together"
        )
    t1 = 1.0 if high == 1 else float(np.quantile(before_P, high))
    t2 = 1.0 if skip == 0 else float(np.quantile(before_P, 1 - skip))
    return t1, max(t1, t2)
