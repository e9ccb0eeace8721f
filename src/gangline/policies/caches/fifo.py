"""First in, first out, and its mirror, last in, first out."""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked import Rank, TouchRankedCache


class FIFO(TouchRankedCache):
    """Evicts the resident that came first (``newest_first``: last).

    SiDA-MoE (arXiv 2310.18859) evicts so inside its memory budget; Pre-gated MoE (arXiv 2308.12066) offers
    LIFO as one of its cache orders.
    """

    def __init__(self, quotas: Sequence[int] | None = None, *, newest_first: bool = False) -> None:
        super().__init__(quotas)
        self._sign = -1 if newest_first else 1
        self._arrivals = 0
        self._arrived: dict[ExpertKey, int] = {}

    def rank(self, key: ExpertKey) -> Rank:
        """Return the number of the arrival, negated for LIFO."""
        return (self._sign * self._arrived[key],)

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Ignore the event: uses do not matter."""
        return None

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident and its turn."""
        self._arrivals += 1
        self._arrived[key] = self._arrivals
        super().admitted(key)
