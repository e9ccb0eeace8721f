"""HybriMoE's prefetch: fetch what shortens a coming layer's schedule most.

"HybriMoE" (arXiv 2504.05897): experts of the next layers are predicted by their gates; the schedule of each
layer is simulated with and without each candidate resident; the candidate with the largest saving is fetched
while the link is idle. (The released code takes the next layer's highest MRS scores instead.)
"""

from collections.abc import Sequence

from gangline.core.cost import CostTable
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher
from gangline.policies.schedule.hybrimoe import two_ended


class ByGain(Prefetcher):
    """Orders missing experts by simulated time saved, weighted by their probability.

    Args:
        cost: measured costs of the machine.
        top_k: experts of each forecast that the simulated layer runs, one token each.
    """

    def __init__(self, cost: CostTable, top_k: int) -> None:
        self.cost, self.top_k = cost, top_k
        self._known: dict[tuple[int, int], float] = {}

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the missing experts that save time, most first; ties go to nearer layers."""
        gains: list[tuple[float, int, ExpertKey]] = []
        for f in forecasts:
            candidates = [ExpertKey(f.layer, expert) for expert in f.experts[: self.top_k]]
            there = [holds(key) for key in candidates]
            experts, resident = len(there), sum(there)
            if resident == experts:
                continue
            saved = self._seconds(experts, resident) - self._seconds(experts, resident + 1)
            if saved > 0:
                missing = zip(candidates, f.probabilities, there, strict=False)
                gains += [(saved * chance, f.horizon, key) for key, chance, has in missing if not has]
        gains.sort(key=lambda gain: (-gain[0], gain[1], gain[2]))
        return [Fetch(key, gain) for gain, _, key in gains[:budget]]

    def _seconds(self, experts: int, resident: int) -> float:
        """Return the time of a layer in which one token each goes to ``experts``, the first of them resident.

        Which ones these are makes no difference, so there are few such layers to time.
        """
        if (experts, resident) not in self._known:
            tokens = dict.fromkeys(range(experts), 1)
            plan = two_ended(tokens, set(range(resident)), self.cost)
            self._known[experts, resident] = plan.seconds
        return self._known[experts, resident]
