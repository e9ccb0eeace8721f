"""Least frequently used with aging: uses count less with every token, and coming layers count a little more.

LFU with exponential decay is old (LRFU, IEEE Transactions on Computers 50(12), 2001); ranking by the distance
of an expert's layer as well is HOBBIT's (arXiv 2411.01433), which counts the last use apart. Here recency is
in the aging alone: the uses of the last hundred tokens or so decide.
"""

from collections.abc import Sequence

import numpy as np

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked_arrays import ArrayRankedCache, Table

_EXPECTED = float(1 << 20)  # more than uses ever count: what the pass is about to need outranks its past


class AgedLFU(ArrayRankedCache):
    """Evicts the lowest ``uses + nearness (1 - ahead / L)``, ``ahead`` the layers until it may be used again.

    Uses of a layer are multiplied by ``age`` with every token that passes it. Those of a prompt count as if
    they were spread evenly over its tokens. What the newest forecast of a layer names goes last of all, until
    the layer's router has decided.

    Args:
        experts: routed experts of each layer.
        age: above 0, at most 1.
        nearness: what the next layer's experts are preferred by, in uses.
        quotas: slots for each layer, or None for one pool.
    """

    def __init__(
        self,
        experts: Sequence[int],
        age: float = 0.97,
        nearness: float = 2.0,
        quotas: Sequence[int] | None = None,
    ) -> None:
        super().__init__(experts, quotas)
        if not 0 < age <= 1 or nearness < 0:
            raise UsageError(
                f"an aging cache needs 0 < age <= 1 and nearness >= 0, not age {age} and nearness {nearness}"
            )
        self.layers, self.age, self.nearness = len(experts), age, nearness
        self._layer = 0
        self._uses_LE, self._expected_LE = self.table(), self.table()

    def priority(self, key: ExpertKey) -> float:
        """Return the sum above."""
        ahead = (key.layer - self._layer - 1) % self.layers
        near = self.nearness * (1 - ahead / self.layers)
        return float(self._uses_LE[key] + self._expected_LE[key] + near)

    def priorities(self, layers: slice) -> Table:
        """Return the same of all experts."""
        ahead_L = (np.arange(self.layers)[layers] - self._layer - 1) % self.layers
        near_L = self.nearness * (1 - ahead_L / self.layers)
        return self._uses_LE[layers] + self._expected_LE[layers] + near_L[:, None]

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Age the layer's uses by the tokens of the event, and add its own."""
        self.reranked()
        self._layer = event.layer
        self._expected_LE[event.layer] = 0.0
        uses_E = self._uses_LE[event.layer]
        uses_E *= self.age**event.tokens
        uses_E[list(event.experts)] += np.multiply(event.counts, self._share(event.tokens))

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Take the newest forecast of each layer."""
        self.reranked()
        for forecast in forecasts:
            self._expected_LE[forecast.layer] = 0.0
            self._expected_LE[forecast.layer, list(forecast.experts)] = _EXPECTED

    def _share(self, tokens: int) -> float:
        """What one of the uses of ``tokens`` tokens counts on average when the last of them has passed."""
        if self.age == 1 or tokens == 1:
            return 1.0
        return (1 - self.age**tokens) / (tokens * (1 - self.age))
