"""The oracle predictor: the true experts, h layers ahead. A bound for every other predictor."""

from collections.abc import Sequence
from typing import Any

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.protocol import Predictor


class Oracle(Predictor):
    """Forecasts the next ``ahead`` events exactly.

    Args:
        events: the events that will be replayed, in order.
        ahead: events (layers, through step ends) to look ahead; None for the rest of this pass and the
            whole next one.
    """

    needs = frozenset({"future"})

    def __init__(self, events: Sequence[RoutingEvent], ahead: int | None = 1) -> None:
        self._events = events
        self.ahead = ahead
        self._at = -1

    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast the first events of pass ``step``."""
        return self._look(step)

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Forecast the events that follow.

        Raises:
            UsageError: it is not the event that was announced.
        """
        self._at += 1
        if self._at >= len(self._events) or (self._events[self._at].step, self._events[self._at].layer) != (
            event.step,
            event.layer,
        ):
            raise UsageError(
                f"layer {event.layer} of step {event.step} is not event {self._at} of the future that the "
                "oracle was given; build it anew from the very trace that is replayed"
            )
        return self._look(event.step)

    def _look(self, step: int) -> list[Forecast]:
        out: list[Forecast] = []
        for position in range(self._at + 1, len(self._events)):
            event, horizon = self._events[position], position - self._at
            if (event.step > step + 1) if self.ahead is None else (horizon > self.ahead):
                break
            ranked = sorted(
                zip(event.experts, event.counts, strict=True), key=lambda pair: (-pair[1], pair[0])
            )
            out.append(
                Forecast(
                    event.step,
                    event.layer,
                    tuple(expert for expert, _ in ranked),
                    tuple(count / event.tokens for _, count in ranked),
                    horizon=horizon,
                    source="oracle",
                )
            )
        return out
