"""HybriMoE's minus recent score (MRS) cache.

"HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference" (arXiv 2504.05897).
After each token ``S = a TopP(s) + (1 - a) S`` per layer, ``s`` the router's scores of all experts with
everything outside the p highest set to 0. The lowest S goes, so an expert that nearly made the top k keeps
its slot.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.ranked_arrays import ArrayRankedCache, Table


class MRS(ArrayRankedCache):
    """Evicts the lowest running score.

    Args:
        experts: routed experts of each layer.
        top_p: scores kept of each token, for each layer (the paper: twice the experts per token).
        alpha: weight ``a`` of the newest token (the paper: 0.5).
        quotas: slots for each layer, or None for one pool.
    """

    needs = frozenset({"scores"})

    def __init__(
        self,
        experts: Sequence[int],
        top_p: Sequence[int],
        alpha: float = 0.5,
        quotas: Sequence[int] | None = None,
    ) -> None:
        super().__init__(experts, quotas)
        self.top_p, self.alpha = list(top_p), alpha
        self._score_LE = self.table()
        self.score_E = [row_E[:count] for row_E, count in zip(self._score_LE, experts, strict=True)]

    def priority(self, key: ExpertKey) -> float:
        """Return S of ``key``."""
        return float(self._score_LE[key])

    def priorities(self, layers: slice) -> Table:
        """Return S of all experts."""
        return self._score_LE[layers]

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Fold the scores of every token, in order, into the layer's S.

        Raises:
            UsageError: the event carries no scores.
        """
        self.reranked()
        if event.detail is None or event.detail.scores_TE is None:
            raise UsageError(
                "the mrs cache needs the router's scores of all experts; record the trace with scores, "
                "or choose another cache"
            )
        score_E = self.score_E[event.layer]
        kept_TE = top_scores(np.asarray(event.detail.scores_TE, dtype=np.float64), self.top_p[event.layer])
        for kept_E in kept_TE:
            score_E *= 1 - self.alpha
            score_E += self.alpha * kept_E


def top_scores(scores_TE: NDArray[np.float64], keep: int) -> NDArray[np.float64]:
    """Return a copy with everything but the ``keep`` highest scores of each row set to 0."""
    if keep >= scores_TE.shape[1]:
        return scores_TE.copy()
    kept_TP = np.argpartition(-scores_TE, keep - 1, axis=1)[:, :keep]
    out_TE = np.zeros_like(scores_TE)
    np.put_along_axis(out_TE, kept_TP, np.take_along_axis(scores_TE, kept_TP, axis=1), axis=1)
    return out_TE
