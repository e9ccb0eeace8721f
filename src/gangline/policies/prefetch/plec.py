"""ExpertFlow's predictive locality-aware expert caching: slots by predicted demand, and correction.

"ExpertFlow: Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token Scheduling"
(arXiv 2410.17954). Slots go to layers by predicted demand, earlier layers first (demands 3 and 2 with 4
slots: 3 and 1). A slot is free again as soon as its layer has finished; ``caches.LookaheadBelady`` evicts so
when it is given the same forecasts. Where the router disagrees, missing experts are read at once and overlap
with those that are there; experts predicted but not used are the first to go.
"""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher


def share_slots(demands: Sequence[int], slots: int) -> list[int]:
    """Give each layer its demand while slots last, in order."""
    out = []
    for demand in demands:
        out.append(min(demand, slots))
        slots -= out[-1]
    return out


class Plec(Prefetcher):
    """Fetches the likeliest experts of the coming layers into as many slots as there are.

    Args:
        slots: slots that the layers ahead may fill.
        threshold: chance from which an expert counts as demanded.
    """

    whole_pass = True

    def __init__(self, slots: int, threshold: float = 0.5) -> None:
        self.slots, self.threshold = slots, threshold

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the missing experts within each layer's share, nearest layer first."""
        ahead = sorted(forecasts, key=lambda f: f.horizon)
        demanded = [
            [(e, p) for e, p in zip(f.experts, f.probabilities, strict=True) if p >= self.threshold]
            for f in ahead
        ]
        shares = share_slots([len(pairs) for pairs in demanded], self.slots)
        out = [
            Fetch(ExpertKey(f.layer, expert), p)
            for f, pairs, share in zip(ahead, demanded, shares, strict=True)
            for expert, p in pairs[:share]
            if not holds(ExpertKey(f.layer, expert))
        ]
        return out[:budget]


def correction(event: RoutingEvent, predicted: Forecast, holds: Holds) -> tuple[list[Fetch], list[ExpertKey]]:
    """Return what the router asked for and is missing, and what was predicted in vain.

    The first list goes ahead of every prefetch; the second names the first victims.
    """
    used = dict(zip(event.experts, event.counts, strict=True))
    keys = sorted((ExpertKey(event.layer, expert) for expert in used), key=lambda k: (-used[k.expert], k))
    missing = [Fetch(key, float(used[key.expert]), Priority.CORRECTION) for key in keys if not holds(key)]
    vain = [ExpertKey(event.layer, expert) for expert in predicted.experts if expert not in used]
    return missing, vain
