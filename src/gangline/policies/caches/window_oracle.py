"""The window oracle of SCH: evict what the coming window uses least.

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv
2505.16056), segment cache best hit rate: the cache knows the next m tokens. Neither a causal policy nor an
upper bound: it may lose to Belady and, rarely, to LFU. A window here is m events of the expert's own layer,
one token each when the trace was decoded by one user.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.future import Future
from gangline.policies.caches.ranked import Rank, RankedCache


class WindowOracle(RankedCache):
    """Evicts what the next ``window`` events of its layer use least; ties: the older."""

    needs = frozenset({"future"})

    def __init__(
        self, events: Sequence[RoutingEvent], quotas: Sequence[int] | None = None, *, window: int = 16
    ) -> None:
        super().__init__(quotas)
        self.window = window
        self._future = Future(events)
        self._positions: defaultdict[int, list[int]] = defaultdict(list)
        for position, event in enumerate(events):
            self._positions[event.layer].append(position)
        self._last: defaultdict[ExpertKey, int] = defaultdict(int)

    def rank(self, key: ExpertKey) -> Rank:
        """Return ``(uses in the window, last event)``."""
        positions = self._positions[key.layer]
        last = bisect_right(positions, self._future.now) + self.window - 1
        end = positions[last] + 1 if last < len(positions) else positions[-1] + 1
        return (self._future.uses_before(key, end), self._last[key])

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Move the clock and note the uses."""
        self.reranked()
        self._future.advance(event)
        for expert in event.experts:
            self._last[ExpertKey(event.layer, expert)] = self._future.now
