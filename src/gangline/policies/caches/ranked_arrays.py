"""Ranks of all experts in arrays: caches whose ranks change at every event.

One look at the arrays finds a victim, where ranking every resident one by one takes Python as long as the
expert takes to compute. The victims are the same.

Shape suffixes: L layers, E experts (the most of all layers), X those of a group, flat.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import Evictable
from gangline.policies.caches.ranked import GroupedCache, Rank

Table = NDArray[np.float64]


class ArrayRankedCache(GroupedCache):
    """Evicts the lowest rank: a priority, then what :attr:`tie_breakers` say, then the key.

    Priorities are computed once for each event, however many victims it takes: who changes one calls
    ``reranked``.

    Args:
        experts: routed experts of each layer.
        quotas: slots for each layer, or None for one pool.
    """

    def __init__(self, experts: Sequence[int], quotas: Sequence[int] | None = None) -> None:
        super().__init__(quotas)
        self._width = max(experts)
        self._here_LE = np.zeros((len(experts), self._width), dtype=bool)
        self._ranking: dict[int, Table] = {}

    @abstractmethod
    def priorities(self, layers: slice) -> Table:
        """Return the priorities of all experts of some layers now, ``[layers, E]``; infinity is no value."""

    @abstractmethod
    def priority(self, key: ExpertKey) -> float:
        """Return the same of one expert, to the last bit."""

    @property
    def tie_breakers(self) -> Sequence[NDArray[Any]]:
        """Tables ``[L, E]`` that decide between equal priorities, in this order; the lowest goes."""
        return ()

    def rank(self, key: ExpertKey) -> Rank:
        """Return how much ``key`` deserves its slot now; ties go by key."""
        return (self.priority(key), *(table[key] for table in self.tie_breakers))

    def table(self) -> Table:
        """Return zeros ``[L, E]``."""
        return np.zeros(self._here_LE.shape)

    def reranked(self) -> None:
        """Take note that priorities may have changed."""
        self._ranking.clear()

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        super().admitted(key)
        self._here_LE[key] = True
        self._put(key, self.priority(key))

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident."""
        super().evicted(key)
        self._here_LE[key] = False
        self._put(key, np.inf)

    def pick(self, group: int, evictable: Evictable) -> ExpertKey | None:
        """Return the evictable resident of the lowest rank."""
        return self.lowest(self._ranks(group), group * self._width, evictable)

    def _ranks(self, group: int) -> Table:
        """Return the priorities of a group now, flat; infinity where nothing is."""
        ranking_X = self._ranking.get(group)
        if ranking_X is None:
            layers = slice(None) if self.quotas is None else slice(group, group + 1)
            shown_LE = np.where(self._here_LE[layers], self.priorities(layers), np.inf)
            ranking_X = self._ranking[group] = shown_LE.ravel()
        return ranking_X

    def lowest(self, ranking_X: Table, first: int, evictable: Evictable) -> ExpertKey | None:
        """Return the evictable expert of the lowest rank in a part of a ranking that begins at ``first``."""
        passed: list[tuple[int, float]] = []
        found = None
        while found is None and (at := self._lowest(ranking_X, first)) is not None:
            key = ExpertKey(*divmod(first + at, self._width))
            if evictable(key):
                found = key
            else:
                passed.append((at, float(ranking_X[at])))
                ranking_X[at] = np.inf
        for at, value in passed:
            ranking_X[at] = value
        return found

    def _lowest(self, ranking_X: Table, first: int) -> int | None:
        """Return the place of the lowest rank in a group that begins at ``first``; None if it is empty."""
        at = int(ranking_X.argmin())
        lowest = ranking_X[at]
        if lowest == np.inf:
            return None
        if not self.tie_breakers:
            return at  # the first of equal ones has the lowest key
        tied_X = np.flatnonzero(ranking_X == lowest)
        for table in self.tie_breakers:
            if len(tied_X) > 1:
                values_X = table.reshape(-1)[first + tied_X]
                tied_X = tied_X[values_X == values_X.min()]
        return int(tied_X[0])

    def _put(self, key: ExpertKey, value: float) -> None:
        """Change one entry of a ranking that is already there."""
        group = self._group(key)
        if (ranking_X := self._ranking.get(group)) is not None:
            ranking_X[(key.layer - group) * self._width + key.expert] = value
