"""Expert buffering: inactive experts first, then last in, first out.

"Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference" (arXiv 2303.06182).
A batch runs its experts in ascending id. A resident that the batch does not use goes first; if all are used,
the last inserted goes, for within the sweep it is the one needed again latest.
"""

from collections import defaultdict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked import Rank, RankedCache


class ExpertBuffering(RankedCache):
    """Evicts experts that the present batch of their layer leaves idle, then by LIFO."""

    def __init__(self, quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._arrivals = 0
        self._arrived: dict[ExpertKey, int] = {}
        self._active: defaultdict[int, frozenset[int]] = defaultdict(frozenset)

    def rank(self, key: ExpertKey) -> Rank:
        """Return ``(active in the present batch, -arrival)``."""
        return (key.expert in self._active[key.layer], -self._arrived[key])

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Note which experts of the layer the batch uses."""
        self.reranked()
        self._active[event.layer] = frozenset(event.experts)

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident and its turn."""
        self._arrivals += 1
        self._arrived[key] = self._arrivals
        super().admitted(key)
