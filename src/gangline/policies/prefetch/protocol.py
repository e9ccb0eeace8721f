"""The protocol of prefetch planners: from forecasts to an ordered list of reads."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey, low_copy
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

    def what(self, layers: int) -> ExpertKey:
        """Return what is read in a model of so many MoE layers: the expert, or its copy in low precision."""
        return low_copy(self.key, layers) if self.precision is Precision.LOW else self.key


class Prefetcher(Protocol):
    """Orders reads of experts that no event waits for yet; demand reads always go first.

    Attributes:
        exact: False only if it asks for LOW precision.
        whole_pass: whether it asks once for all layers of a pass, and not anew after each layer.
    """

    exact: bool = True
    whole_pass: bool = False

    def plan(self, forecasts: Sequence[Forecast], holds: Holds, budget: int | None = None) -> list[Fetch]:
        """Return the reads to queue now, best first, without duplicates and without what ``holds`` has.

        Args:
            forecasts: what the predictors just said.
            holds: whether an expert is resident or on its way.
            budget: experts that the link can bring before they would be late; None for no limit.
        """
        ...

    def room(self, slots: int, top_k: int, waiting: int) -> int:
        """Return how many reads may be queued now, so that they flood neither the link nor the slots.

        A planner that is asked after each layer loses nothing by a short queue: what was left out comes up
        again.

        Args:
            slots: expert slots in all.
            top_k: experts per token, the most of all layers.
            waiting: reads that were queued before and whose layer has not routed since. How many have
                arrived would depend on the link, and no two runs would be the same.
        """
        most = slots // 2 if self.whole_pass else min(slots // 2, 2 * top_k)
        return max(0, most - waiting)

    def stale(self, event: RoutingEvent, queued: Collection[ExpertKey]) -> list[ExpertKey]:
        """Return queued reads for the layer of ``event`` that its router did not ask for."""
        return [key for key in queued if key.layer == event.layer and key.expert not in event.experts]

    def after_routing(
        self, event: RoutingEvent, queued: Collection[ExpertKey], layers: int
    ) -> tuple[list[ExpertKey], set[ExpertKey]]:
        """Return queued reads that an event has made stale, and those that stay queued behind it.

        Args:
            event: at its layer a router has decided.
            queued: experts, and copies in low precision (:func:`gangline.core.keys.low_copy`).
            layers: MoE layers of the model.
        """
        experts = {key for key in queued if key.layer < layers}
        copies = {ExpertKey(key.layer - layers, key.expert) for key in queued if key.layer >= layers}
        stale = [*self.stale(event, experts)]
        stale += [low_copy(key, layers) for key in self.stale(event, copies)]
        return stale, {key for key in queued if key.layer % layers != event.layer}
