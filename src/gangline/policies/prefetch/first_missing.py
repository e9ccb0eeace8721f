"""HOBBIT's prefetch: walk ahead to the first layer that lacks something, and fetch that.

"HOBBIT" (arXiv 2411.01433), layer-level prefetch (AdapMoE, arXiv 2408.10284, looks ahead in the same way).
If all predicted experts of the next layer are there, look one layer further; stop at the first layer with
something missing. With thresholds the same rule as on misses picks HIGH or LOW by predicted weight, since a
wrong LOW copy costs a fraction of a wrong HIGH one.
"""

from collections.abc import Sequence

from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey, low_copy
from gangline.core.precision import Precision
from gangline.policies.precision.hobbit import HobbitPrecision
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher


class FirstMissing(Prefetcher):
    """Fetches what the nearest incomplete layer lacks.

    Args:
        top_k: predicted experts per layer to ask for.
        precision: HOBBIT's rule, or None to fetch HIGH always (exact).
        layers: MoE layers of the model, by which copies in low precision are named
            (:func:`gangline.core.keys.low_copy`); either copy does where LOW is wanted.
    """

    def __init__(self, top_k: int, precision: HobbitPrecision | None = None, layers: int = 0) -> None:
        self.top_k, self.precision, self.layers = top_k, precision, layers
        self.exact = precision is None or precision.exact

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the missing experts of one layer, likeliest first."""
        for f in sorted(forecasts, key=lambda f: f.horizon):
            experts, weights = f.experts[: self.top_k], f.probabilities[: self.top_k]
            chosen = [Precision.HIGH] * len(experts)
            if self.precision is not None:
                chosen = self.precision.by_weight(weights)
            missing = [
                Fetch(ExpertKey(f.layer, expert), p, precision=precision)
                for expert, p, precision in zip(experts, weights, chosen, strict=True)
                if precision is not Precision.SKIP
                and not self._there(ExpertKey(f.layer, expert), precision, holds)
            ]
            if missing:
                return missing[:budget]
        return []

    def _there(self, key: ExpertKey, wanted: Precision, holds: Holds) -> bool:
        low = wanted is Precision.LOW and self.layers > 0
        return holds(key) or (low and holds(low_copy(key, self.layers)))

    def protected(self, forecasts: Sequence[Forecast]) -> frozenset[ExpertKey]:
        """Return the predicted keys, which must not be evicted meanwhile."""
        return frozenset(ExpertKey(f.layer, expert) for f in forecasts for expert in f.experts[: self.top_k])
