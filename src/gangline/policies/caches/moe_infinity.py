"""MoE-Infinity's activation-aware cache.

"MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert Cache" (arXiv
2401.14361). When a slot is needed, every cached expert e of layer i gets ``(pEAM[i,e] / sum_e pEAM[i,:] +
eps) (1 - i/L)`` and the lowest goes. The second factor favours early layers, which are hard to predict and
leave little time to prefetch; it counts from layer 0, not from the current layer. pEAM comes as forecasts of
the trace-matching predictor; without any, all experts of a layer are alike and use counts decide.

Shape suffixes: L layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked_arrays import ArrayRankedCache, Table


class MoEInfinityCache(ArrayRankedCache):
    """Evicts by predicted activation and depth; ties: fewest tokens, then least recent.

    Args:
        experts: routed experts of each layer.
        quotas: slots for each layer, or None for one pool (as in the paper).
        eps: keeps depth in the ranking of experts that no stored trace used.
    """

    def __init__(
        self, experts: Sequence[int], quotas: Sequence[int] | None = None, *, eps: float = 1e-4
    ) -> None:
        super().__init__(experts, quotas)
        self.eps = eps
        self._experts = list(experts)
        self._share_LE = self.table() + [[1 / max(count, 1)] for count in experts]
        self._depth_L = 1 - np.arange(len(experts)) / len(experts)
        self._newest: dict[int, tuple[Forecast, float]] = {}
        self._events = 0
        self._uses_LE, self._last_LE = self.table(), self.table()

    @property
    def tie_breakers(self) -> Sequence[NDArray[Any]]:
        """Tokens, and the last event."""
        return self._uses_LE, self._last_LE

    def priority(self, key: ExpertKey) -> float:
        """Return the predicted share of the expert in its layer, weighted by depth."""
        self._read_forecasts()
        return float((self._share_LE[key] + self.eps) * self._depth_L[key.layer])

    def priorities(self, layers: slice) -> Table:
        """Return the same of all experts."""
        self._read_forecasts()
        found_LE: Table = (self._share_LE[layers] + self.eps) * self._depth_L[layers, None]
        return found_LE

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Count the uses that break ties."""
        self.reranked()
        self._events += 1
        used = event.layer, list(event.experts)
        self._uses_LE[used] += event.counts
        self._last_LE[used] = self._events

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Take the newest predicted row of each layer."""
        self.reranked()
        for forecast in forecasts:
            total = sum(forecast.probabilities)
            if total > 0 and self._experts[forecast.layer]:
                self._newest[forecast.layer] = forecast, total

    def _read_forecasts(self) -> None:
        """Put the newest rows into the table: only now, for most are overtaken before anybody asks."""
        for layer, (forecast, total) in self._newest.items():
            self._share_LE[layer] = 0.0
            self._share_LE[layer, list(forecast.experts)] = np.array(forecast.probabilities) / total
        self._newest.clear()
