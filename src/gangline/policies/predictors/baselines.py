"""What any predictor must beat: the experts of the last token, and popularity."""

import numpy as np
from numpy.typing import NDArray

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import forecast


class LastToken(Predictor):
    """Forecasts that the next layer repeats what it did in the pass before.

    Args:
        layers: MoE layers.
        ahead: layers to forecast; passes wrap around.
    """

    def __init__(self, layers: int, ahead: int = 1) -> None:
        self.layers, self.ahead = layers, ahead
        self._last: dict[int, RoutingEvent] = {}

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Remember the event; forecast the following layers."""
        self._last[event.layer] = event
        out = []
        for horizon in range(1, min(self.ahead, self.layers) + 1):
            passes, layer = divmod(event.layer + horizon, self.layers)
            if layer in self._last:
                past = self._last[layer]
                counts = np.zeros(max(past.experts) + 1)
                counts[list(past.experts)] = past.counts
                out.append(forecast(event.step + passes, layer, counts / past.tokens, horizon, "last-token"))
        return out


class Popularity(Predictor):
    """Forecasts each layer's most used experts so far, whatever the input.

    Args:
        experts: routed experts of each layer.
        ahead: layers to forecast; passes wrap around.
    """

    def __init__(self, experts: list[int], ahead: int = 1) -> None:
        self.ahead = ahead
        self._counts: list[NDArray[np.float64]] = [np.zeros(count) for count in experts]

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Count the event; forecast the following layers."""
        self._counts[event.layer][list(event.experts)] += event.counts
        out = []
        for horizon in range(1, min(self.ahead, len(self._counts)) + 1):
            passes, layer = divmod(event.layer + horizon, len(self._counts))
            total = self._counts[layer].sum()
            if total:
                row = self._counts[layer] / total
                out.append(forecast(event.step + passes, layer, row, horizon, "popularity"))
        return out
