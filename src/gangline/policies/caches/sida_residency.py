"""SiDA's residency: the predicted set of the batch stays, the rest leaves first in, first out.

"SiDA-MoE: Sparsity-Inspired Data-Aware Serving for Efficient and Scalable Large Mixture-of-Experts Models"
(arXiv 2310.18859). The hash table of a batch names every expert that it will use before layer 0 runs; what
is not in it may go, oldest first. The released code evicts all of it at once; we evict only when a slot is
needed, which is the paper's own description.
"""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.caches.fifo import FIFO
from gangline.policies.caches.protocol import Evictable


class SidaResidency(FIFO):
    """FIFO among residents outside the predicted sets; inside them only when nothing else may go."""

    def __init__(self, quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._predicted: dict[int, set[ExpertKey]] = {}

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Forget the sets of passes that are over."""
        for step in [step for step in self._predicted if step < event.step]:
            del self._predicted[step]

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Add forecasts to the set of their pass (the hash thread is one batch ahead)."""
        for forecast in forecasts:
            keys = self._predicted.setdefault(forecast.step, set())
            keys.update(ExpertKey(forecast.layer, expert) for expert in forecast.experts)

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the oldest resident that was not predicted, else the oldest."""
        needed = set[ExpertKey]().union(*self._predicted.values())
        surplus = super().pick(group, lambda key: key not in needed and evictable(key))
        return surplus or super().pick(group, evictable)
