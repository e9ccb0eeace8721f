"""Least recently used. All experts of one event are used at the same moment."""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked import Rank, TouchRankedCache


class LRU(TouchRankedCache):
    """Evicts the resident whose last event is the oldest; ties go by key.

    Without quotas this is one pool for all layers, which never hits when it is smaller than the working set
    of one token (sequential flooding).
    """

    def __init__(self, quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._now = 0
        self._last: dict[ExpertKey, int] = {}

    def rank(self, key: ExpertKey) -> Rank:
        """Return the number of the last event that used ``key``."""
        return (self._last[key],)

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Set the recency of every expert of the event."""
        self._now += 1
        for expert in event.experts:
            key = ExpertKey(event.layer, expert)
            self._last[key] = self._now
            self.touch(key)

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident; one that no event asked for counts as used now."""
        self._last.setdefault(key, self._now)
        super().admitted(key)

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident and its recency."""
        super().evicted(key)
        del self._last[key]
