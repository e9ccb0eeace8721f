"""Token-id statistics: which experts each token id used before.

"OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models" (arXiv 2402.01739) finds that routing
follows token ids, hardly the context, and is settled early in training. So a table from token id to expert
frequencies, per layer, is a baseline that every learned predictor has to beat; on models whose routing
depends on context it is a poor one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import forecast


class TokenStatistics(Predictor):
    """Forecasts all layers of a pass from its token ids alone.

    ``p(e | t) = (n_te + prior m_e) / (n_t + prior)`` with m the layer's overall shares; a token never seen
    gets m. The forecast of several tokens is the mean.

    Args:
        experts: routed experts of each layer.
        prior: weight of the overall shares, in tokens.
        learn: go on counting while it predicts.
    """

    needs = frozenset({"ids", "token_ids"})

    def __init__(self, experts: Sequence[int], prior: float = 1.0, *, learn: bool = True) -> None:
        self.experts, self.prior, self.learn = list(experts), prior, learn
        self._by_token: list[dict[int, NDArray[np.float64]]] = [{} for _ in experts]
        self._overall: list[NDArray[np.float64]] = [np.zeros(count) for count in experts]

    def fit(self, events: Iterable[RoutingEvent]) -> "TokenStatistics":
        """Count the events of a trace. Returns itself."""
        for event in events:
            self._count(event)
        return self

    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast every layer of pass ``step``; nothing for layers that were never counted."""
        return [
            forecast(
                step, layer, np.mean([self.share(layer, t) for t in token_ids], 0), layer + 1, "token-id"
            )
            for layer, overall in enumerate(self._overall)
            if len(token_ids) and overall.any()
        ]

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Count the event."""
        if self.learn:
            self._count(event)
        return []

    def tables(self) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Return for each layer the token ids that were seen, ascending, and their counts ``[N, E]``."""
        out = []
        for counts, experts in zip(self._by_token, self.experts, strict=True):
            tokens = sorted(counts)
            rows = [counts[token] for token in tokens]
            out.append((np.array(tokens, dtype=np.int64), np.array(rows).reshape(len(tokens), experts)))
        return out

    def restore(self, layer: int, tokens_N: NDArray[np.int64], counts_NE: NDArray[np.float64]) -> None:
        """Take up what :meth:`tables` returned for a layer."""
        rows = zip(tokens_N.tolist(), counts_NE.astype(np.float64), strict=True)
        self._by_token[layer] = dict(rows)
        self._overall[layer] = counts_NE.sum(axis=0, dtype=np.float64)

    def _count(self, event: RoutingEvent) -> None:
        detail = event.detail
        if detail is None or detail.ids_TK is None or detail.token_ids_T is None:
            raise UsageError(
                "token-id statistics need the ids of tokens and their experts; record the trace in mode ids"
            )
        self.count(event.layer, detail.token_ids_T, detail.ids_TK)

    def count(self, layer: int, token_ids_T: NDArray[np.integer], ids_TK: NDArray[np.integer]) -> None:
        """Count the experts ``[T, K]`` that some tokens used in a layer."""
        overall, by_token = self._overall[layer], self._by_token[layer]
        for token, ids_K in zip(token_ids_T.tolist(), ids_TK, strict=True):
            counts = by_token.setdefault(token, np.zeros_like(overall))
            counts[ids_K] += 1
            overall[ids_K] += 1

    def share(self, layer: int, token: int) -> NDArray[np.float64]:
        """Return the shares ``[E]`` of a layer's experts for one token id, summing to 1.

        The layer must have been counted.
        """
        overall = self._overall[layer]
        share: NDArray[np.float64] = overall / overall.sum()
        counts = self._by_token[layer].get(token)
        if counts is not None:
            share = (counts + self.prior * share) / (counts.sum() + self.prior)
        return share
