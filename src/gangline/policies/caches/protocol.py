"""The protocol of cache policies. A policy sees keys and events only, never a byte.

Only ``on_event``, ``admitted``, ``evicted`` and ``victim`` must be written; a policy that derives from
:class:`CachePolicy` gets harmless defaults for the rest. The order around one event, the same in the engine
and in the simulator: ``on_event`` (hits decided), then for every miss ``admit`` and ``victim`` (only when no
slot is free), ``evicted``, ``admitted``; after that ``on_forecast`` with what the predictors said.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from gangline.core.events import Need, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.core.precision import Precision

Evictable = Callable[[ExpertKey], bool]


class CachePolicy(Protocol):
    """Chooses victims. Deterministic; ``exact`` because no choice of victim can change a model's output.

    Attributes:
        needs: what events must carry for this policy beyond counts; ``future`` for clairvoyant ones.
    """

    exact: bool = True
    needs: Collection[Need] = frozenset()

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Note a routing event. Its hits are decided and leased before any victim is asked for."""

    def admitted(self, key: ExpertKey) -> None:
        """Note that ``key`` now occupies a slot."""

    def evicted(self, key: ExpertKey) -> None:
        """Note that ``key`` gave its slot up."""

    def victim(self, layer: int, evictable: Evictable) -> ExpertKey | None:
        """Return the resident key that should make room for an expert of ``layer``, or None to wait.

        ``evictable(key)`` is False for keys that are leased or still being read.
        """

    def admit(self, key: ExpertKey, evictable: Evictable) -> bool:
        """Whether a missed ``key`` deserves a victim's slot; asked before ``victim`` when no slot is free.

        False lets it stream through without being kept (bypass). A store without a way around its slots
        need not ask.
        """
        return True

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Note what predictors expect."""
        return None

    def on_precision(self, event: RoutingEvent, chosen: Mapping[int, Precision]) -> None:
        """Note at which precision experts of ``event`` are used, where that is not HIGH for all."""
        return None

    def on_request_start(self) -> None:
        """Note that a new sequence begins."""
        return None

    def on_request_end(self) -> None:
        """Note that a sequence is complete."""
        return None
