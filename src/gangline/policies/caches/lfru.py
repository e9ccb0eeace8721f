"""Least frequent recently used: recency protects some residents, frequency decides among the others.

After "A Cache Management Scheme for Efficient Content Eviction and Replication in Cache Networks" (Bilal and
Kang, arXiv 1702.04078). The cache has a privileged part kept by recency; what recency drops from it falls
into the unprivileged part, where the least frequently used goes. We differ in two points: the parts are a
share of the residents instead of fixed slots, and counts are halved every ``window`` events of a group
instead of being normalised, so that an old favourite fades.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import Evictable
from gangline.policies.caches.ranked import GroupedCache


class LFRU(GroupedCache):
    """Evicts the least frequently used of those that are not among the most recently used.

    Args:
        quotas: slots for each layer, or None for one pool.
        privileged: share of the residents that recency protects, 0 (LFU) to 1 (LRU).
        window: events of one layer after which its counts are halved.
    """

    def __init__(
        self, quotas: Sequence[int] | None = None, *, privileged: float = 0.5, window: int = 256
    ) -> None:
        super().__init__(quotas)
        self.privileged, self.window = privileged, window
        self._now = 0
        self._events: defaultdict[int, int] = defaultdict(int)
        self._uses: defaultdict[ExpertKey, float] = defaultdict(float)
        self._last: defaultdict[ExpertKey, int] = defaultdict(int)

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Count and refresh the experts of the event."""
        self._now += 1
        self._events[event.layer] += 1
        if self._events[event.layer] % self.window == 0:
            for key in self._uses:
                if key.layer == event.layer:
                    self._uses[key] /= 2
        for expert, count in zip(event.experts, event.counts, strict=True):
            key = ExpertKey(event.layer, expert)
            self._uses[key] += count
            self._last[key] = self._now

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident; one that no event asked for counts as recent, but not as used."""
        self._last[key] = self._now
        super().admitted(key)

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the least frequent unprivileged resident, else the least recent privileged one."""
        residents = self._groups[group]
        protected = min(int(self.privileged * len(residents)), len(residents) - 1)
        recent = heapq.nlargest(protected, residents, key=lambda key: (self._last[key], key))
        rest = (key for key in residents.difference(recent) if evictable(key))
        found = min(rest, key=lambda key: (self._uses[key], self._last[key], key), default=None)
        return found or next((key for key in reversed(recent) if evictable(key)), None)
