"""How often a predictor was right lately, so that nobody acts on one that is mostly wrong.

Not from a paper. A forecast that fails costs the time of its bytes, and the slot of an expert that may be
wanted. Counted in events, not in seconds, so that a simulation decides as the engine does.
"""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast

MEMORY = 0.1
"""Weight of the newest event in the running mean."""

RETRY = 8
"""Every so many passes a predictor that is not trusted shows whether it would be right now."""


class TrackRecord:
    """The share of an earlier forecast's first experts that their layer used, a running mean over events.

    Args:
        top_k: experts of a forecast that count.
        least: precision from which forecasts may be acted on.

    Attributes:
        precision: that share; 1 before anything is known.
    """

    def __init__(self, top_k: int | None, least: float) -> None:
        self.precision, self._least = 1.0, least
        self._top_k = top_k
        self._lost = 0  # the step at which trust was lost
        self._said: dict[int, Forecast] = {}

    @property
    def earned(self) -> bool:
        """Whether forecasts may be acted on."""
        return self.precision >= self._least

    def tested(self, step: int) -> bool:
        """Whether forecasts are worth making in this pass, to be acted on or to be compared.

        Passes count from where trust was lost: a replay numbers them differently from a model that has run
        before.
        """
        return self.earned or (step - self._lost) % RETRY == 0

    def judge(self, event: RoutingEvent) -> None:
        """Compare what was said of the event's layer with what it uses."""
        said = self._said.pop(event.layer, None)
        if said is None or said.step != event.step:
            return
        first = said.experts[: self._top_k]
        right = len(set(first).intersection(event.experts)) / max(1, len(first))
        earned = self.earned
        self.precision += MEMORY * (right - self.precision)
        if earned and not self.earned:
            self._lost = event.step

    def note(self, forecasts: Sequence[Forecast]) -> None:
        """Remember what is said of the next layer."""
        for forecast in forecasts:
            if forecast.horizon == 1:
                self._said[forecast.layer] = forecast
