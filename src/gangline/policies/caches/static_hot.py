"""A static hot set: the most popular experts of a profile never leave.

The placement of Fiddler (arXiv 2402.07033). How much a list covers depends on the model, so it is always
measured on calibration text, never shipped.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import Evictable
from gangline.policies.caches.ranked import Rank, RankedCache


class StaticHot(RankedCache):
    """Keeps the hot experts for good; the others pass through what is left, least recently used first.

    Args:
        hot: keys that never leave once they are there.
    """

    def __init__(self, hot: Iterable[ExpertKey]) -> None:
        super().__init__()
        self.hot = frozenset(hot)
        self._events = 0
        self._last: defaultdict[ExpertKey, int] = defaultdict(int)

    def rank(self, key: ExpertKey) -> Rank:
        """Return the last event that used ``key``."""
        return (self._last[key],)

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Note the uses."""
        self.reranked()
        self._events += 1
        for expert in event.experts:
            self._last[ExpertKey(event.layer, expert)] = self._events

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the least recently used resident that is not hot."""
        return super().pick(group, lambda key: key not in self.hot and evictable(key))

    def admit(self, key: ExpertKey, evictable: Evictable) -> bool:
        """Return False if only hot experts could make room."""
        return self.victim(key.layer, evictable) is not None


def hottest(tokens: Mapping[ExpertKey, int], slots: int) -> list[ExpertKey]:
    """Return the ``slots`` keys with the most tokens; ties go by key."""
    return sorted(tokens, key=lambda key: (-tokens[key], key))[:slots]
