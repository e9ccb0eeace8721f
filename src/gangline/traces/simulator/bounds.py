"""Bounds that no policy beats on given events: Belady's MIN, and the fewest bytes and seconds.

Belady, "A study of replacement algorithms for a virtual-storage computer" (IBM Systems Journal 1966), for
events that ask for several experts at once: what an event finds is decided before it changes the cache.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey


@dataclass(frozen=True)
class Bound:
    """What the clairvoyant cache reaches.

    Attributes:
        hits: distinct experts of events that were resident.
        misses: those that were not.
    """

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float | None:
        """Share of hits; None without events."""
        seen = self.hits + self.misses
        return self.hits / seen if seen else None

    def __add__(self, other: "Bound") -> "Bound":
        return Bound(self.hits + other.hits, self.misses + other.misses)


def belady(events: Sequence[RoutingEvent], slots: int, *, bypass: bool = True) -> Bound:
    """Return the most hits that any demand-driven cache of ``slots`` slots can have, all layers in one pool.

    After each event the experts stay whose next use is soonest.

    Args:
        events: in order.
        slots: experts that the cache holds.
        bypass: whether an expert may be used without being kept. If not, the experts of an event all stay
            until the next one (unless they are more than ``slots``): what engines that must load into a slot
            can reach.
    """
    return _belady(_accesses(events), slots, bypass)


def belady_per_layer(events: Sequence[RoutingEvent], quotas: Sequence[int], *, bypass: bool = True) -> Bound:
    """The same for a cache that is divided between layers; ``quotas`` are the slots of each."""
    total = Bound(0, 0)
    for layer, slots in enumerate(quotas):
        mine = [event for event in events if event.layer == layer]
        total += _belady(_accesses(mine), slots, bypass)
    return total


def distinct_experts(events: Iterable[RoutingEvent]) -> int:
    """Return how many different experts the events use: the misses of a cache that holds everything."""
    return len({(event.layer, expert) for event in events for expert in event.experts})


def fewest_bytes(events: Sequence[RoutingEvent], slots: int, expert_bytes: Sequence[int]) -> int:
    """Return bytes that any policy with ``slots`` slots must move, prefetching or not.

    Each use of an expert that the clairvoyant cache with bypass misses is a transfer that no policy can save.
    Where layers differ in the size of an expert, the smallest one is counted.
    """
    misses = belady(events, slots).misses
    return misses * min(expert_bytes)


_Access = list[tuple[ExpertKey, ...]]


def _accesses(events: Sequence[RoutingEvent]) -> _Access:
    return [tuple(ExpertKey(event.layer, expert) for expert in event.experts) for event in events]


def _next_uses(accesses: _Access) -> list[tuple[float, ...]]:
    """For every access of every event the number of the event that uses the expert next."""
    upcoming: dict[ExpertKey, int] = {}
    found: list[tuple[float, ...]] = [()] * len(accesses)
    for number in range(len(accesses) - 1, -1, -1):
        keys = accesses[number]
        found[number] = tuple(upcoming.get(key, math.inf) for key in keys)
        upcoming.update(dict.fromkeys(keys, number))
    return found


def _belady(accesses: _Access, slots: int, bypass: bool) -> Bound:
    hits = total = 0
    resident: dict[ExpertKey, float] = {}
    furthest: list[tuple[float, ExpertKey]] = []  # may hold entries that are out of date
    for keys, uses in zip(accesses, _next_uses(accesses), strict=True):
        hits += sum(key in resident for key in keys)
        total += len(keys)
        for key, use in zip(keys, uses, strict=True):
            resident[key] = use
            heapq.heappush(furthest, (-use, key))
        pinned = set(keys) if not bypass and len(keys) <= slots else set()
        kept: list[tuple[float, ExpertKey]] = []
        while len(resident) > slots:
            use, key = heapq.heappop(furthest)
            if resident.get(key) != -use:
                continue
            if key in pinned:
                kept.append((use, key))
            else:
                del resident[key]
        for entry in kept:
            heapq.heappush(furthest, entry)
    return Bound(hits, total - hits)
