"""What cache policies share: residents in groups, and the lowest rank that may go.

A policy with quotas partitions its slots between layers: the layer furthest over its quota, counting the
newcomer, loses its own lowest rank. Without quotas all residents form one pool.
"""

import heapq
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import CachePolicy, Evictable

Rank = tuple[float, ...]


class GroupedCache(CachePolicy):
    """Keeps residents per layer (with quotas) or in one pool (without); ``pick`` chooses inside a group.

    Args:
        quotas: slots for each layer, or None for one pool.
    """

    def __init__(self, quotas: Sequence[int] | None = None) -> None:
        self.quotas = None if quotas is None else list(quotas)
        self._groups: defaultdict[int, set[ExpertKey]] = defaultdict(set)

    @abstractmethod
    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the victim among the residents of a group, or None if none may go."""

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        self._groups[self._group(key)].add(key)

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident."""
        self._groups[self._group(key)].discard(key)

    def victim(self, layer: int, evictable: Evictable) -> ExpertKey | None:
        """Return the victim of the first group that has one, the group furthest over its quota first."""
        for group in self._victim_groups(layer):
            key = self.pick(group, evictable)
            if key is not None:
                return key
        return None

    def _group(self, key: ExpertKey) -> int:
        return 0 if self.quotas is None else key.layer

    def _residents(self, key: ExpertKey) -> Collection[ExpertKey]:
        return self._groups[self._group(key)]

    def _victim_groups(self, layer: int) -> Iterator[int]:
        if self.quotas is None:
            yield 0
            return
        yield from over_quota([len(self._groups[i]) for i in range(len(self.quotas))], self.quotas, layer)


def over_quota(sizes: Sequence[int], quotas: Sequence[int], layer: int) -> list[int]:
    """Return the layers over their quota, furthest first; ``sizes`` holds residents, ``layer`` a newcomer."""
    excess = [size + (i == layer) - quota for i, (size, quota) in enumerate(zip(sizes, quotas, strict=True))]
    return sorted((i for i, e in enumerate(excess) if e > 0), key=lambda i: (-excess[i], i != layer))


class RankedCache(GroupedCache):
    """Evicts the lowest rank; ranks may change at any event.

    All candidates are ranked once for each event, however many victims it takes: who changes a rank calls
    ``reranked``.
    """

    def __init__(self, quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._ranking: dict[int, list[tuple[Rank, ExpertKey]]] = {}

    @abstractmethod
    def rank(self, key: ExpertKey) -> Rank:
        """Return how much ``key`` deserves its slot now; ties go by key."""

    def reranked(self) -> None:
        """Take note that ranks may have changed."""
        self._ranking.clear()

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        super().admitted(key)
        ranking = self._ranking.get(self._group(key))
        if ranking is not None:
            heapq.heappush(ranking, (self.rank(key), key))

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the evictable resident of the lowest rank."""
        residents = self._groups[group]
        ranking = self._ranking.get(group)
        if ranking is None:
            ranking = self._ranking[group] = [(self.rank(key), key) for key in residents]
            heapq.heapify(ranking)
        passed: list[tuple[Rank, ExpertKey]] = []
        found = None
        while ranking and found is None:
            entry = heapq.heappop(ranking)
            rank, key = entry
            if key not in residents or rank != self.rank(key) or (passed and passed[-1] == entry):
                continue  # it has gone, or left and came back
            passed.append(entry)
            if evictable(key):
                found = key
        for entry in passed:
            heapq.heappush(ranking, entry)
        return found


class TouchRankedCache(RankedCache):
    """A ranked cache whose ranks change only at ``touch``: a heap instead of a scan."""

    def __init__(self, quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._heaps: defaultdict[int, list[tuple[Rank, ExpertKey]]] = defaultdict(list)

    def touch(self, key: ExpertKey) -> None:
        """Take note that the rank of ``key`` may have changed."""
        group = self._group(key)
        if key in self._groups[group]:
            heapq.heappush(self._heaps[group], (self.rank(key), key))
            if len(self._heaps[group]) > 8 * len(self._groups[group]) + 64:
                self._heaps[group] = [(self.rank(k), k) for k in self._groups[group]]
                heapq.heapify(self._heaps[group])

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        super().admitted(key)
        self.touch(key)

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the evictable resident of the lowest rank; outdated heap entries are dropped on the way."""
        heap, found = self._heaps[group], None
        kept: list[tuple[Rank, ExpertKey]] = []
        while heap and found is None:
            entry = heapq.heappop(heap)
            rank, key = entry
            if key not in self._groups[group] or rank != self.rank(key) or (kept and kept[-1] == entry):
                continue
            kept.append(entry)
            if evictable(key):
                found = key
        for entry in kept:
            heapq.heappush(heap, entry)
        return found
