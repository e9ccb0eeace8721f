"""Least frequently used, counted in tokens; ties go to the least recently used."""

from collections import defaultdict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked import Rank, TouchRankedCache


class LFU(TouchRankedCache):
    """Evicts the resident that the fewest tokens used.

    Args:
        quotas: slots for each layer, or None for one pool.
        in_cache: forget the count of an expert when it is evicted (MoE-Infinity's released cache); by default
            counts are for ever (perfect LFU).
        per_request: forget all counts when a sequence begins (HOBBIT, arXiv 2411.01433, finds that it helps).
    """

    def __init__(
        self, quotas: Sequence[int] | None = None, *, in_cache: bool = False, per_request: bool = False
    ) -> None:
        super().__init__(quotas)
        self.in_cache, self.per_request = in_cache, per_request
        self._now = 0
        self._uses: defaultdict[ExpertKey, int] = defaultdict(int)
        self._last: defaultdict[ExpertKey, int] = defaultdict(int)

    def rank(self, key: ExpertKey) -> Rank:
        """Return ``(tokens, last event)``."""
        return (self._uses[key], self._last[key])

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Count the tokens of every expert of the event."""
        self._now += 1
        for expert, count in zip(event.experts, event.counts, strict=True):
            key = ExpertKey(event.layer, expert)
            self._uses[key] += count
            self._last[key] = self._now
            self.touch(key)

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident, and its count with ``in_cache``."""
        super().evicted(key)
        if self.in_cache:
            del self._uses[key]

    def on_request_start(self) -> None:
        """Forget all counts with ``per_request``."""
        if self.per_request:
            self._uses.clear()
            for residents in self._groups.values():
                for key in residents:
                    self.touch(key)
