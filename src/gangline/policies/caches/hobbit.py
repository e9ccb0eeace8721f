"""HOBBIT's multidimensional cache.

"HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference" (arXiv 2411.01433), sequence-level
cache. Priority of expert i, the lowest goes first:

    w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - ((l_i - l + L) mod L) / L)

R is the number of the token that used it last, F its uses and H its high-precision uses in this sequence, T
the tokens so far, l the current layer. The paper fits the weights on calibration traces and keeps one pool
for each precision: give every pool a policy of its own.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.precision import Precision
from gangline.policies.caches.ranked_arrays import ArrayRankedCache, Table


class HobbitCache(ArrayRankedCache):
    """Evicts by recency, frequency, high-precision frequency and distance of the layer.

    Args:
        experts: routed experts of each layer.
        weights: ``(w_lru, w_lfu, w_lhu, w_fld)``, summing to 1.
        quotas: slots for each layer, or None for one pool (as in the paper).
    """

    def __init__(
        self,
        experts: Sequence[int],
        weights: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25),
        quotas: Sequence[int] | None = None,
    ) -> None:
        super().__init__(experts, quotas)
        if abs(sum(weights) - 1) > 1e-6 or min(weights) < 0:
            raise UsageError(f"the weights of the hobbit cache must be >= 0 and sum to 1, not {weights}")
        self.layers, self.weights = len(experts), weights
        self._layer = 0
        self._step: int | None = None
        self._start_sequence()

    def priority(self, key: ExpertKey) -> float:
        """Return the weighted sum of the four terms."""
        recency, frequency, high, distance = self.weights
        ahead = (key.layer - self._layer) % self.layers
        past = recency * self._last_LE[key] + frequency * self._uses_LE[key] + high * self._high_LE[key]
        return float(past / max(self._tokens, 1) + distance * (1 - ahead / self.layers))

    def priorities(self, layers: slice) -> Table:
        """Return the same of all experts."""
        recency, frequency, high, distance = self.weights
        ahead_L = (np.arange(self.layers)[layers] - self._layer) % self.layers
        past_LE = recency * self._last_LE[layers] + frequency * self._uses_LE[layers]
        past_LE += high * self._high_LE[layers]
        past_LE /= max(self._tokens, 1)
        past_LE += (distance * (1 - ahead_L / self.layers))[:, None]
        return past_LE

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Count the uses of the event; every use is high precision until ``on_precision`` says otherwise."""
        self.reranked()
        if event.step != self._step:
            self._step = event.step
            self._tokens += event.tokens
        self._layer = event.layer
        used = event.layer, list(event.experts)
        self._last_LE[used] = self._tokens
        self._uses_LE[used] += event.counts
        self._high_LE[used] += event.counts

    def on_precision(self, event: RoutingEvent, chosen: Mapping[int, Precision]) -> None:
        """Take back the high-precision uses of experts that run in LOW or not at all."""
        self.reranked()
        for expert, count in zip(event.experts, event.counts, strict=True):
            if chosen.get(expert, Precision.HIGH) is not Precision.HIGH:
                self._high_LE[event.layer, expert] -= count

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident; it counts as used by the present token."""
        self._last_LE[key] = self._tokens
        super().admitted(key)

    def on_request_start(self) -> None:
        """Forget the last sequence."""
        self.reranked()
        self._start_sequence()

    def _start_sequence(self) -> None:
        self._tokens = 0
        self._last_LE, self._uses_LE, self._high_LE = self.table(), self.table(), self.table()
