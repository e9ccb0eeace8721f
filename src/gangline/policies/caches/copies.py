"""A cache policy for slots of copies in low precision, which are named like experts of further layers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey, low_copy
from gangline.core.precision import Precision
from gangline.policies.caches.protocol import CachePolicy, Evictable


class CopiesCache(CachePolicy):
    """Lets a policy see the copies of experts under the experts' own names.

    Args:
        policy: that chooses; it sees every event of the model, and only the copies as residents.
        layers: MoE layers of the model (see :func:`gangline.core.keys.low_copy`).
    """

    def __init__(self, policy: CachePolicy, layers: int) -> None:
        self.policy, self.layers = policy, layers
        self.exact, self.needs = policy.exact, policy.needs

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Pass on an event whose layer is that of the copies."""
        self.policy.on_event(self._own(event), hits)

    def on_precision(self, event: RoutingEvent, chosen: Mapping[int, Precision]) -> None:
        """Pass on what was chosen."""
        self.policy.on_precision(self._own(event), chosen)

    def admitted(self, key: ExpertKey) -> None:
        """Pass on a new resident."""
        self.policy.admitted(self._name(key))

    def evicted(self, key: ExpertKey) -> None:
        """Pass on that a copy went."""
        self.policy.evicted(self._name(key))

    def victim(self, layer: int, evictable: Evictable) -> ExpertKey | None:
        """Return the copy that makes room."""
        found = self.policy.victim(layer - self.layers, lambda key: evictable(low_copy(key, self.layers)))
        return None if found is None else low_copy(found, self.layers)

    def admit(self, key: ExpertKey, evictable: Evictable) -> bool:
        """Ask the policy."""
        return self.policy.admit(self._name(key), lambda other: evictable(low_copy(other, self.layers)))

    def on_forecast(self, forecasts: Sequence[Forecast]) -> None:
        """Pass on forecasts, which name the experts."""
        self.policy.on_forecast(forecasts)

    def on_request_start(self) -> None:
        """Pass on that a sequence begins."""
        self.policy.on_request_start()

    def on_request_end(self) -> None:
        """Pass on that a sequence is complete."""
        self.policy.on_request_end()

    def _name(self, key: ExpertKey) -> ExpertKey:
        return ExpertKey(key.layer - self.layers, key.expert)

    def _own(self, event: RoutingEvent) -> RoutingEvent:
        return replace(event, layer=event.layer - self.layers)
