"""The protocol of cache policies. A policy sees keys and events only, never a byte."""

from collections.abc import Callable
from typing import Protocol

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey


class CachePolicy(Protocol):
    """Chooses victims. Deterministic; ``exact`` because no choice of victim can change a model's output."""

    exact: bool

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Note a routing event. Its hits are decided and leased before any victim is asked for."""

    def admitted(self, key: ExpertKey) -> None:
        """Note that ``key`` now occupies a slot."""

    def evicted(self, key: ExpertKey) -> None:
        """Note that ``key`` gave its slot up."""

    def victim(self, layer: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """Return the resident key that should make room for an expert of ``layer``, or None to wait.

        ``evictable(key)`` is False for keys that are leased or still being read.
        """
