"""Belady's MIN: evict what is used furthest in the future. A bound, for it must know the future.

Belady, "A study of replacement algorithms for a virtual-storage computer" (IBM Systems Journal 1966). With
``bypass`` a missed expert may pass through without a slot if everything resident is used earlier.
"""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.future import Future
from gangline.policies.caches.protocol import Evictable
from gangline.policies.caches.ranked import Rank, TouchRankedCache


class Belady(TouchRankedCache):
    """Evicts the resident whose next use is furthest away.

    Args:
        events: the events that will be replayed.
        quotas: slots for each layer, or None for one pool (the higher bound).
        bypass: allow misses to stream through.
    """

    needs = frozenset({"future"})

    def __init__(
        self, events: Sequence[RoutingEvent], quotas: Sequence[int] | None = None, *, bypass: bool = False
    ) -> None:
        super().__init__(quotas)
        self.bypass = bypass
        self._future = Future(events)

    def rank(self, key: ExpertKey) -> Rank:
        """Return the negated number of the next event that uses ``key``."""
        return (-self._future.next_use(key),)

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Move the clock; only the experts of the event get a new next use."""
        self._future.advance(event)
        for expert in event.experts:
            self.touch(ExpertKey(event.layer, expert))

    def admit(self, key: ExpertKey, evictable: Evictable) -> bool:
        """Return False, with ``bypass``, if no resident that may go is used later than ``key``."""
        if not self.bypass:
            return True
        victim = self.victim(key.layer, evictable)
        return victim is not None and self.rank(victim) < self.rank(key)
