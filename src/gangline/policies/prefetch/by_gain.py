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

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the missing experts that save time, most first; ties go to nearer layers."""
        gains: list[tuple[float, int, ExpertKey]] = []
        for f in forecasts:
            tokens = dict.fromkeys(f.experts[: self.top_k], 1)
            resident = {expert for expert in tokens if holds(ExpertKey(f.layer, expert))}
            without = two_ended(tokens, resident, self.cost).seconds
            chance = dict(zip(f.experts, f.probabilities, strict=True))
            for expert in set(tokens).difference(resident):
                saved = without - two_ended(tokens, resident | {expert}, self.cost).seconds
                if saved > 0:
                    gains.append((saved * chance[expert], f.horizon, ExpertKey(f.layer, expert)))
        gains.sort(key=lambda gain: (-gain[0], gain[1], gain[2]))
        return [Fetch(key, gain) for gain, _, key in gains[:budget]]
