"""Counters of the store and of generation; plain numbers, cheap to update on the token path."""

from dataclasses import asdict, dataclass, field
from typing import Any

from gangline.core.counts import EventCounts
from gangline.core.tiers import Priority


@dataclass
class StoreStats(EventCounts):
    """What the store did since it was opened.

    A hit was found in HOST memory, a miss had to be read from DISK.

    Attributes:
        stall_seconds: time the computing thread waited for bytes.
        compute_seconds: time from handing experts out until the next ones were asked for.
        evictions: experts that gave up their slot.
        useful_prefetch_bytes: read ahead and used by an event; ``wasted_prefetch_bytes`` were evicted unused.
        bytes_read: payload bytes read from DISK, by priority class; cancelled reads do not count.
    """

    stall_seconds: float = 0.0
    compute_seconds: float = 0.0
    evictions: int = 0
    useful_prefetch_bytes: int = 0
    wasted_prefetch_bytes: int = 0
    bytes_read: dict[str, int] = field(default_factory=lambda: {p.name.lower(): 0 for p in Priority})

    @property
    def total_bytes_read(self) -> int:
        """Payload bytes read from DISK."""
        return sum(self.bytes_read.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all counters with the derived ones."""
        return asdict(self) | {"total_bytes_read": self.total_bytes_read, "hit_rate": self.hit_rate}
