"""Fate's prefetch: the top k of the next layer, then near misses while time lasts.

"Accurate Expert Predictions in MoE Inference via Cross-Layer Gate" (Fate, arXiv 2502.12224). The budget is
``n = floor(T_overlap / t_expert)``: the time of one layer's attention, gate and experts over the time to
move one expert. First the predicted top k, then experts whose predicted weight is close to the k-th, up to
n.
"""

from collections.abc import Sequence

from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher


class FatePrefetch(Prefetcher):
    """Widens the top k by what is nearly as likely.

    Args:
        top_k: experts per token.
        closeness: share of the k-th probability that an extra expert needs (not given in the paper).
    """

    def __init__(self, top_k: int, closeness: float = 0.5) -> None:
        self.top_k, self.closeness = top_k, closeness

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return missing experts, nearest layer first; a budget of 0 leaves caching alone."""
        out: list[Fetch] = []
        for f in sorted(forecasts, key=lambda f: f.horizon):
            if not f.experts:
                continue
            kth = f.probabilities[: self.top_k][-1]
            for rank, (expert, p) in enumerate(zip(f.experts, f.probabilities, strict=True)):
                key = ExpertKey(f.layer, expert)
                if (rank < self.top_k or p >= self.closeness * kth) and not holds(key):
                    out.append(Fetch(key, p))
        return out[:budget]


def overlap_budget(t_overlap: float, t_expert: float) -> int:
    """Return how many experts the link brings in ``t_overlap`` seconds at ``t_expert`` seconds each."""
    return int(t_overlap / t_expert)
