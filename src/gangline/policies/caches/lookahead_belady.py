"""Belady over what is already known: Read-ME's eviction.

"Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design" (arXiv
2410.19123): routing is known before the experts run, so evict ``argmax F(e, t)``, F the next request time
over all queued requests. Here the knowledge comes as forecasts, exact ones from a decoupled router or hints
from any predictor; an expert that no forecast names counts as never requested, and the least recently used
of those goes first.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked import Rank, RankedCache


class LookaheadBelady(RankedCache):
    """Evicts the resident whose next forecast use is furthest away.

    Args:
        quotas: slots for each layer, or None for one pool.
        threshold: forecast probabilities below it are not believed.
    """

    def __init__(self, quotas: Sequence[int] | None = None, *, threshold: float = 0.0) -> None:
        super().__init__(quotas)
        self.threshold = threshold
        self._now = (-1, -1)
        self._events = 0
        self._expected: dict[tuple[int, int], frozenset[int]] = {}
        self._last: defaultdict[ExpertKey, int] = defaultdict(int)

    def rank(self, key: ExpertKey) -> Rank:
        """Return ``(-step, -layer)`` of the next forecast use, then the last event."""
        uses = (at for at, experts in self._expected.items() if at[1] == key.layer and key.expert in experts)
        step, layer = min(uses, default=(math.inf, math.inf))
        return (-step, -layer, self._last[key])

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Forget forecasts that are past."""
        self.reranked()
        self._now = (event.step, event.layer)
        self._events += 1
        self._expected = {at: experts for at, experts in self._expected.items() if at > self._now}
        for expert in event.experts:
            self._last[ExpertKey(event.layer, expert)] = self._events

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident; it counts as used now."""
        self._last[key] = self._events
        super().admitted(key)

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Take the newest forecast for each layer of each pass."""
        self.reranked()
        for forecast in forecasts:
            at = (forecast.step, forecast.layer)
            if at > self._now:
                believed = zip(forecast.experts, forecast.probabilities, strict=True)
                self._expected[at] = frozenset(e for e, p in believed if p >= self.threshold)
