"""What a simulated run counts."""

from dataclasses import dataclass, field
from typing import Any

from gangline.core.counts import EventCounts
from gangline.core.events import Phase, RoutingEvent


@dataclass
class PhaseCounts(EventCounts):
    """Counters of one phase.

    Attributes:
        events: routing events; ``tokens`` rows of the first layer's events.
        distinct: distinct experts per event, summed.
        seconds: modelled time.
    """

    events: int = 0
    tokens: int = 0
    distinct: int = 0
    seconds: float = 0.0

    @property
    def selection_hit_rate(self) -> float | None:
        """Share of hits with each expert counted once per token; None without events."""
        seen = self.hit_tokens + self.miss_tokens
        return self.hit_tokens / seen if seen else None

    def count(self, event: RoutingEvent, hits: set[int], late: int, by_prefetch: int) -> None:
        """Add one event."""
        self.note(event)
        self.count_event(event, hits, late, by_prefetch)

    def note(self, event: RoutingEvent) -> None:
        """Add one event whose hits are counted apart."""
        self.events += 1
        self.tokens += event.tokens if event.layer == 0 else 0
        self.distinct += len(event.experts)


@dataclass
class Counters:
    """All phases, and where time went.

    Attributes:
        phases: by phase.
        stall_seconds: time that computing waited, by cause: ``demand`` (bytes of a miss), ``late`` (a
            prefetch still on its way), ``in_place`` (the CPU pool was the last to finish).
        compute_seconds: time in which the device computed.
        in_place: experts computed where they lie; ``bypassed`` went through without a slot.
    """

    phases: dict[Phase, PhaseCounts] = field(
        default_factory=lambda: {"prefill": PhaseCounts(), "decode": PhaseCounts()}
    )
    stall_seconds: dict[str, float] = field(
        default_factory=lambda: {"demand": 0.0, "late": 0.0, "in_place": 0.0}
    )
    compute_seconds: float = 0.0
    in_place: int = 0
    bypassed: int = 0

    def total(self, name: str) -> Any:
        """Return a counter summed over phases."""
        return sum(getattr(counts, name) for counts in self.phases.values())
