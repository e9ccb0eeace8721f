"""Adaptive replacement cache.

Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (USENIX FAST 2003); Fate (arXiv
2502.12224) uses it for its deeper layers. Residents used once lie in T1, those used again in T2; B1 and B2
remember what each lost. A return from B1 grows the target size of T1, one from B2 shrinks it. We differ
where events force it: all misses of one event adapt the target before its first victim is chosen, and leased
experts are passed over.
"""

from collections import OrderedDict
from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import Evictable
from gangline.policies.caches.ranked import GroupedCache

_Lru = OrderedDict[ExpertKey, None]


class ArcLists:
    """The four lists of one group of ``capacity`` slots. Each runs from least to most recently used."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.target = 0.0
        self.once: _Lru = OrderedDict()
        self.again: _Lru = OrderedDict()
        self.lost_once: _Lru = OrderedDict()
        self.lost_again: _Lru = OrderedDict()

    def used(self, key: ExpertKey) -> None:
        """A hit goes to the fresh end of T2; a miss that a ghost remembers moves the target."""
        if key in self.once or key in self.again:
            self.once.pop(key, None)
            self.again.pop(key, None)
            self.again[key] = None
        elif key in self.lost_once:
            step = max(1.0, len(self.lost_again) / len(self.lost_once))
            self.target = min(float(self.capacity), self.target + step)
        elif key in self.lost_again:
            step = max(1.0, len(self.lost_once) / len(self.lost_again))
            self.target = max(0.0, self.target - step)

    def admitted(self, key: ExpertKey) -> None:
        """Enter T2 if a ghost remembers the key, else T1."""
        known = key in self.lost_once or key in self.lost_again
        self.lost_once.pop(key, None)
        self.lost_again.pop(key, None)
        (self.again if known else self.once)[key] = None
        self._trim()

    def evicted(self, key: ExpertKey) -> None:
        """Leave a ghost."""
        if key in self.once:
            del self.once[key]
            self.lost_once[key] = None
        else:
            del self.again[key]
            self.lost_again[key] = None
        self._trim()

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """Return T1's oldest while T1 is over its target, else T2's; the other list if none there may go."""
        order = (self.once, self.again) if len(self.once) > self.target else (self.again, self.once)
        return next((key for part in order for key in part if evictable(key)), None)

    def _trim(self) -> None:
        """Forget ghosts until |T1|+|B1| is within the capacity and all four lists within twice of it."""
        while self.lost_once and len(self.once) + len(self.lost_once) > self.capacity:
            self.lost_once.popitem(last=False)
        while self.lost_again and self._size() > 2 * self.capacity:
            self.lost_again.popitem(last=False)

    def _size(self) -> int:
        return len(self.once) + len(self.again) + len(self.lost_once) + len(self.lost_again)


class ARC(GroupedCache):
    """One set of ARC lists for each layer (with quotas) or for all layers together.

    Args:
        slots: slots in all.
        quotas: slots for each layer, or None for one pool.
    """

    def __init__(self, slots: int, quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._lists = [ArcLists(capacity) for capacity in ([slots] if quotas is None else quotas)]

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Refresh the hits, then let the misses move the target."""
        lists = self._lists[self._group(ExpertKey(event.layer, 0))]
        missed = set(event.experts).difference(hits)
        for expert in (*hits, *sorted(missed)):
            lists.used(ExpertKey(event.layer, expert))

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        super().admitted(key)
        self._lists[self._group(key)].admitted(key)

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident, but leave a ghost."""
        super().evicted(key)
        self._lists[self._group(key)].evicted(key)

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return ARC's replacement in the group."""
        return self._lists[group].victim(evictable)
