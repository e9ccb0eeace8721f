"""The protocol of prefetch planners: from forecasts to an ordered list of reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.core.precision import Precision
from gangline.core.tiers import Priority

Holds = Callable[[ExpertKey], bool]


@dataclass(frozen=True, slots=True)
class Fetch:
    """One read that a planner asks for. Lists of them are served front first."""

    key: ExpertKey
    score: float
    priority: Priority = Priority.PREFETCH
    precision: Precision = Precision.HIGH


class Prefetcher(Protocol):
    """Orders reads of experts that no event waits for yet; demand reads always go first.

    Attributes:
        exact: False only if it asks for LOW precision.
    """

    exact: bool = True

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the reads to queue now, best first, without duplicates and without what ``holds`` has.

        Args:
            forecasts: what the predictors just said.
            holds: whether an expert is resident or on its way.
            budget: experts that the link can bring before they would be late; None for no limit.
        """
        ...
