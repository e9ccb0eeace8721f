"""Next-gate prediction: the gates of later layers on this layer's gate input. Needs no training.

"Accurate Expert Predictions in MoE Inference via Cross-Layer Gate" (Fate, arXiv 2502.12224) applies gate l+1
to the gate input of layer l, because inputs of adjacent gates are alike (cosine over 0.78). "HOBBIT" (arXiv
2411.01433) does so for the next p gates, p 1 to 3; HybriMoE (arXiv 2504.05897) for the next 3. The input
must be the *normalised* gate input: a recall below about 0.6 at top-k means that it is not.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import ranked
from gangline.policies.predictors.track_record import TrackRecord

Gate = Callable[[Any], Any]
"""Takes gate inputs ``[T, D]`` and returns scores ``[T, E]``, of NumPy or torch."""


Ranked = tuple[Sequence[int], Sequence[float]]
"""All experts of a layer, best first (ties: ascending id), and their scores."""


@runtime_checkable
class Several(Protocol):
    """Gates that score several layers in one call."""

    def several(self, layers: Sequence[int], x_TD: Any) -> Sequence[Any]:
        """Return what the gate of each layer would, in order."""
        ...

    def ranked(self, layers: Sequence[int], x_1D: Any) -> Sequence[Ranked] | None:
        """Return the same for one token, sorted; None if they cannot."""
        ...


class NextGate(Predictor):
    """Forecasts the next layers with their own gates. Layer 0 has no forecast.

    Args:
        gates: one gate for each layer; the model's routers, or :func:`linear_gate`. They are asked for
            several layers at once if they are :class:`Several`.
        ahead: layers to forecast (p).
        top_k: if given, tokens vote with their top-k scores only.
        most_tokens: no forecast of passes over more tokens, which ask for most experts anyway.
        least_precision: no forecasts while a smaller share of the last ones came true (see
            :class:`TrackRecord`); some are still made and compared. None trusts them always.
    """

    needs = frozenset({"gate_input"})
    source = "next-gate"

    def __init__(
        self,
        gates: Sequence[Gate],
        ahead: int = 1,
        top_k: int | None = None,
        most_tokens: int | None = None,
        least_precision: float | None = None,
    ) -> None:
        self.gates, self.ahead, self.top_k, self.most_tokens = gates, ahead, top_k, most_tokens
        self._trust = None if least_precision is None else TrackRecord(top_k, least_precision)
        self._several = gates if isinstance(gates, Several) else None

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Forecast the next layers of this pass from the event's gate input.

        Raises:
            UsageError: the event carries no gate input.
        """
        if event.detail is None or event.detail.gate_input_TD is None:
            raise UsageError(
                "the next-gate predictor needs gate inputs; record the trace with them, "
                "or choose another predictor"
            )
        if self._trust is not None:
            self._trust.judge(event)
        if self.most_tokens is not None and event.tokens > self.most_tokens:
            return []
        if self._trust is None:
            return self._forecasts(event)
        if not self._trust.tested(event.step):
            return []
        forecasts = self._forecasts(event)
        self._trust.note(forecasts)
        return forecasts if self._trust.earned else []

    def _forecasts(self, event: RoutingEvent) -> list[Forecast]:
        assert event.detail is not None
        layers = range(event.layer + 1, min(event.layer + self.ahead + 1, len(self.gates)))
        if event.tokens == 1 and self._several is not None and layers:
            ranked_L = self._several.ranked(layers, event.detail.gate_input_TD)
            if ranked_L is not None:
                return [
                    self._forecast(event, layer, *best) for layer, best in zip(layers, ranked_L, strict=True)
                ]
        votes = [self._votes(np.asarray(s_TE, dtype=np.float64)) for s_TE in self._scores(layers, event)]
        horizons = [layer - event.layer for layer in layers]
        return ranked([event.step] * len(layers), layers, votes, horizons, self.source)

    def _forecast(
        self, event: RoutingEvent, layer: int, experts: Sequence[int], scores: Sequence[float]
    ) -> Forecast:
        least = 0.0 if self.top_k is None else scores[min(self.top_k, len(scores)) - 1]
        if scores[-1] < least or scores[-1] <= 0:
            scores = [score for score in scores if score >= least and score > 0]
            experts = experts[: len(scores)]
        horizon = layer - event.layer
        return Forecast(event.step, layer, tuple(experts), tuple(scores), horizon=horizon, source=self.source)

    def _scores(self, layers: Sequence[int], event: RoutingEvent) -> Sequence[Any]:
        """Return the scores ``[T, E]`` of some layers for the event's gate input."""
        assert event.detail is not None
        x_TD = event.detail.gate_input_TD
        if len(layers) > 1 and self._several is not None:
            return self._several.several(layers, x_TD)
        return [self.gates[layer](x_TD) for layer in layers]

    def _votes(self, scores_TE: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean score of each expert over the tokens."""
        if self.top_k is not None and self.top_k < scores_TE.shape[1]:
            kth_T1 = -np.partition(-scores_TE, self.top_k - 1, axis=1)[:, self.top_k - 1 : self.top_k]
            scores_TE = np.where(scores_TE >= kth_T1, scores_TE, 0.0)
        if len(scores_TE) == 1:
            only_E: NDArray[np.float64] = scores_TE[0]
            return only_E
        mean_E: NDArray[np.float64] = scores_TE.mean(axis=0)
        return mean_E


def linear_gate(weight_ED: NDArray[np.floating]) -> Gate:
    """Return ``softmax(x W^T)`` as a gate on NumPy arrays."""

    def gate(x_TD: NDArray[np.floating]) -> NDArray[np.floating]:
        logits_TE = x_TD @ weight_ED.T
        exp_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        scores_TE: NDArray[np.floating] = exp_TE / exp_TE.sum(axis=1, keepdims=True)
        return scores_TE

    return gate
