"""FreeToken's split of the misses of one decoded token: fetch q, run the others on the CPU meanwhile.

"FreeToken" (arXiv 2608.16157). Both sides read host DRAM: fetching q of m experts of S bytes takes ``q S /
B_P``, the CPU needs ``(m - q) S / (B_H - B_P)`` for the others; they meet at ``q* = m B_P / B_H``. The
integer neighbour with the smaller maximum is taken. The split is used only if ``B_H > 2 B_P``; otherwise all
are fetched. Rates measured while both run are better than the difference: :func:`split_contended`.
"""

import math

from gangline.core.cost import CostTable
from gangline.core.events import RoutingEvent
from gangline.policies.schedule.protocol import Assignment, Scheduler, timed, tokens_of


def q_star(misses: int, dram: float, link: float) -> int:
    """Return how many of ``misses`` experts to fetch.

    Args:
        misses: missed experts m.
        dram: bytes/s of host memory, B_H.
        link: bytes/s of the copy to the device, B_P.
    """
    return _best(misses, misses * link / dram, link, dram - link)


def split(misses: int, dram: float, link: float) -> int:
    """Return :func:`q_star`, or all misses where host memory is not over twice as fast as the link."""
    return q_star(misses, dram, link) if dram > 2 * link else misses


def split_contended(misses: int, link: float, cpu: float) -> int:
    """Return how many to fetch from rates measured while copy and CPU run together (bytes/s)."""
    return _best(misses, misses * link / (link + cpu), link, cpu)


def _best(misses: int, exact: float, link: float, cpu: float) -> int:
    candidates = {min(misses, max(0, q)) for q in (math.floor(exact), math.ceil(exact))}
    return min(sorted(candidates), key=lambda q: max(q / link, (misses - q) / cpu))


class FreeTokenSchedule(Scheduler):
    """Fetches the q most recently active misses and computes the rest on the CPU.

    Recency counts uses on either side, so an expert that keeps missing is fetched next time.
    """

    def __init__(self) -> None:
        self._now = 0
        self._last: dict[tuple[int, int], int] = {}

    def assign(self, event: RoutingEvent, resident: set[int], cost: CostTable) -> Assignment:
        """Return residents first, then the fetched."""
        tokens, layer = tokens_of(event), event.layer
        missed = [e for e in tokens if e not in resident]
        missed.sort(key=lambda e: (-self._last.get((layer, e), -1), e))
        q = self._fetched(len(missed), cost)
        gpu = [*sorted(e for e in tokens if e in resident), *missed[:q]]
        self._now += 1
        for expert in tokens:
            self._last[layer, expert] = self._now
        return timed(tuple(gpu), tuple(missed[q:]), tokens, resident, cost)

    def _fetched(self, misses: int, cost: CostTable) -> int:
        if cost.gpu is None:
            return 0
        link = cost.contended.get("host_to_hbm")
        if link:
            return split_contended(misses, link, cost.expert_bytes / cost.t_cpu(1))
        link = cost.bandwidth["host_to_hbm"]
        return split(misses, cost.dram or cost.expert_bytes / cost.t_cpu(1), link)
