"""MoE-Infinity's prefetch: every later layer of the pass by probability, nearer layers first.

"MoE-Infinity" (arXiv 2401.14361): the value of expert e of layer i, seen from layer l, is ``pEAM[i,e] (1 -
(i - l) / L)``. The released code decays by L+1, and without a time budget its backlog can flood the link;
give one.
"""

from collections.abc import Sequence

from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher


class AllLater(Prefetcher):
    """Orders all forecast experts by probability and nearness.

    Args:
        layers: MoE layers L. Forecasts of L layers ahead or more (the same layer of the next pass) are left
        out.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the missing experts by descending ``p (1 - horizon / L)``."""
        best: dict[ExpertKey, float] = {}
        for f in forecasts:
            total = sum(f.probabilities)
            for expert, p in zip(f.experts, f.probabilities, strict=True):
                key = ExpertKey(f.layer, expert)
                value = p / total * (1 - f.horizon / self.layers)
                if value > best.get(key, 0.0) and not holds(key):
                    best[key] = value
        ranked = sorted(best, key=lambda key: (-best[key], key))
        return [Fetch(key, best[key]) for key in ranked[:budget]]
