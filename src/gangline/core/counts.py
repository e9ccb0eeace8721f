"""What the engine and the simulator both count about routing events."""

from collections.abc import Container
from dataclasses import dataclass

from gangline.core.events import RoutingEvent


@dataclass
class EventCounts:
    """Counters of routing events.

    Attributes:
        hits: experts of events that had a slot when the event came, those on their way included (distinct
            experts of each event); ``misses`` had none.
        late: hits that were still on their way; ``by_prefetch``: hits that a prefetch had brought.
        hit_tokens, miss_tokens: the same, each expert counted once per token that chose it.
        low_hits, low_misses: those of them that were computed in low precision; ``skipped``: experts of
            events that were not computed, and are neither hits nor misses.
    """

    hits: int = 0
    misses: int = 0
    late: int = 0
    by_prefetch: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    low_hits: int = 0
    low_misses: int = 0
    skipped: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of hits; None before the first event."""
        seen = self.hits + self.misses
        return self.hits / seen if seen else None

    def count_event(
        self, event: RoutingEvent, hits: Container[int], late: int, by_prefetch: int, low: bool = False
    ) -> None:
        """Add one event; ``low``: all its experts are computed in low precision."""
        self.late += late
        self.by_prefetch += by_prefetch
        if low:
            found = sum(expert in hits for expert in event.experts)
            self.low_hits += found
            self.low_misses += len(event.experts) - found
        for expert, count in zip(event.experts, event.counts, strict=True):
            if expert in hits:
                self.hits += 1
                self.hit_tokens += count
            else:
                self.misses += 1
                self.miss_tokens += count
