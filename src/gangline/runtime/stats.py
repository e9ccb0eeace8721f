"""Counters of the store and of generation; plain numbers, cheap to update on the token path."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gangline.core.tiers import Priority


@dataclass
class StoreStats:
    """What the store did since it was opened (or since ``reset``).

    Attributes:
        hits: experts of events found in HOST memory (distinct experts per event).
        misses: experts of events that had to be read from DISK.
        late: experts of events that a prefetch was still reading when they were asked for (counted in
            ``hits``); ``by_prefetch``: hits that a prefetch had brought.
        hit_tokens: (token, expert) pairs served by ``hits``; ``miss_tokens`` by ``misses``.
        stall_seconds: time the computing thread waited for bytes.
        evictions: experts that gave up their slot.
        useful_prefetch_bytes: read ahead and used by an event; ``wasted_prefetch_bytes`` were evicted unused.
        bytes_read: payload bytes read from DISK, by priority class; cancelled reads do not count.
    """

    hits: int = 0
    misses: int = 0
    late: int = 0
    by_prefetch: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    stall_seconds: float = 0.0
    evictions: int = 0
    useful_prefetch_bytes: int = 0
    wasted_prefetch_bytes: int = 0
    bytes_read: dict[str, int] = field(default_factory=lambda: {p.name.lower(): 0 for p in Priority})

    @property
    def total_bytes_read(self) -> int:
        """Payload bytes read from DISK."""
        return sum(self.bytes_read.values())

    @property
    def hit_rate(self) -> float | None:
        """Share of distinct experts per event found in HOST memory; None before the first event."""
        seen = self.hits + self.misses
        return self.hits / seen if seen else None

    def to_dict(self) -> dict[str, Any]:
        """Return all counters with the derived ones."""
        return asdict(self) | {"total_bytes_read": self.total_bytes_read, "hit_rate": self.hit_rate}
