"""MoE-Infinity's activation-aware cache.

"MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert Cache" (arXiv
2401.14361). When a slot is needed, every cached expert e of layer i gets ``(pEAM[i,e] / sum_e pEAM[i,:] +
eps) (1 - i/L)`` and the lowest goes. The second factor favours early layers, which are hard to predict and
leave little time to prefetch; it counts from layer 0, not from the current layer. pEAM comes as forecasts of
the trace-matching predictor; without any, all experts of a layer are alike and use counts decide.
"""

from collections import defaultdict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked import Rank, RankedCache


class MoEInfinityCache(RankedCache):
    """Evicts by predicted activation and depth; ties: fewest tokens, then least recent.

    Args:
        experts: routed experts of each layer.
        quotas: slots for each layer, or None for one pool (as in the paper).
        eps: keeps depth in the ranking of experts that no stored trace used.
    """

    def __init__(
        self, experts: Sequence[int], quotas: Sequence[int] | None = None, *, eps: float = 1e-4
    ) -> None:
        super().__init__(quotas)
        self.eps = eps
        self._experts = list(experts)
        self._share: list[dict[int, float] | None] = [None] * len(experts)
        self._events = 0
        self._uses: defaultdict[ExpertKey, int] = defaultdict(int)
        self._last: defaultdict[ExpertKey, int] = defaultdict(int)

    def rank(self, key: ExpertKey) -> Rank:
        """Return ``(priority, tokens, last event)``."""
        return (self.priority(key), self._uses[key], self._last[key])

    def priority(self, key: ExpertKey) -> float:
        """Return the predicted share of the expert in its layer, weighted by depth."""
        share = self._share[key.layer]
        p = 1 / self._experts[key.layer] if share is None else share.get(key.expert, 0.0)
        return (p + self.eps) * (1 - key.layer / len(self._experts))

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Count the uses that break ties."""
        self.reranked()
        self._events += 1
        for expert, count in zip(event.experts, event.counts, strict=True):
            self._uses[ExpertKey(event.layer, expert)] += count
            self._last[ExpertKey(event.layer, expert)] = self._events

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Take the newest predicted row of each layer."""
        self.reranked()
        for forecast in forecasts:
            total = sum(forecast.probabilities)
            if total > 0:
                row = zip(forecast.experts, forecast.probabilities, strict=True)
                self._share[forecast.layer] = {expert: p / total for expert, p in row}
