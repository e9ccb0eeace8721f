"""MoE-Infinity's prefetch: every later layer of the pass by probability, nearer layers first.

"MoE-Infinity" (arXiv 2401.14361): the value of expert e of layer i, seen from layer l, is ``pEAM[i,e] (1 -
(i - l) / L)``. The released code decays by L+1, and without a time budget its backlog can flood the link;
give one.

Shape suffix: X forecast experts of all layers.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

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
        rows = [f for f in forecasts if f.experts and f.horizon < self.layers]
        if not rows:
            return []
        value_X = np.concatenate(
            [np.array(f.probabilities) / sum(f.probabilities) * (1 - f.horizon / self.layers) for f in rows]
        )
        expert_X = np.fromiter(chain.from_iterable(f.experts for f in rows), dtype=np.int64)
        layer_X = np.repeat([f.layer for f in rows], [len(f.experts) for f in rows])
        order_X = np.lexsort((expert_X, layer_X, -value_X))
        ordered = zip(*(of_X[order_X].tolist() for of_X in (value_X, layer_X, expert_X)), strict=True)
        found: dict[ExpertKey, float] = {}
        for value, layer, expert in ordered:
            if value <= 0 or (budget is not None and len(found) >= budget):
                break
            key = ExpertKey(layer, expert)
            if not holds(key) and key not in found:
                found[key] = value
        return [Fetch(key, value) for key, value in found.items()]
