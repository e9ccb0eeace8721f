"""Random eviction: the lower baseline, and the way ``check`` shuffles the order of the cache."""

import random
from collections.abc import Callable

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import CachePolicy


class RandomEviction(CachePolicy):
    """Evicts any evictable resident with equal probability."""

    exact = True

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._resident: set[ExpertKey] = set()

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Ignore the event."""

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        self._resident.add(key)

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident."""
        self._resident.discard(key)

    def victim(self, layer: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """Return a random evictable key, or None."""
        candidates = [key for key in sorted(self._resident) if evictable(key)]
        return self._random.choice(candidates) if candidates else None
