"""What moving and computing cost in a simulation. Numbers come from a measurement, or are left out."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from gangline.core.errors import UsageError


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line over tokens: ``fixed + per_token * tokens``."""

    fixed: float = 0.0
    per_token: float = 0.0

    def __call__(self, tokens: int) -> float:
        """Seconds for a number of tokens."""
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class SimLink:
    """A way for expert bytes.

    Attributes:
        name: for reports, for example ``disk`` or ``pcie``.
        bytes_per_second: of large reads; infinite if nothing is to be said about time.
        latency: seconds before the first byte of each expert.
        chunk_bytes: a demand waits for at most the rest of one chunk of something less urgent.
        contended: share of the speed that is left while the processor computes experts where they lie.
    """

    name: str = "disk"
    bytes_per_second: float = math.inf
    latency: float = 0.0
    chunk_bytes: int = 16 * 2**20
    contended: float = 1.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or self.latency < 0 or self.chunk_bytes < 1:
            raise UsageError(
                f"link {self.name}: {self.bytes_per_second} bytes/s, latency {self.latency}, chunks of "
                f"{self.chunk_bytes}: speed and chunks must be above zero, latency not below"
            )
        if not 0 < self.contended <= 1:
            raise UsageError(f"link {self.name}: contended share {self.contended} must be above 0, at most 1")


@dataclass(frozen=True)
class SimMachine:
    """The resources besides links: the device that computes from slots, and perhaps a CPU pool beside it.

    Attributes:
        expert: seconds of one expert on its tokens, from a slot.
        layer: seconds of everything else between two MoE layers (attention, router, shared experts).
        in_place: seconds of one expert computed where its bytes lie, by the CPU pool, which works beside the
            device; None if there is no such pool.
    """

    expert: Line = Line()
    layer: Line = Line()
    in_place: Line | None = None

    @property
    def timed(self) -> bool:
        """Whether computing takes any time at all."""
        lines = (self.expert, self.layer)
        return any(line.fixed or line.per_token for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def scaled(self, factor: float) -> "SimMachine":
        """Return a machine that computes ``factor`` times as fast."""

        def line(old: Line) -> Line:
            return Line(old.fixed / factor, old.per_token / factor)

        in_place = None if self.in_place is None else line(self.in_place)
        return replace(self, expert=line(self.expert), layer=line(self.layer), in_place=in_place)
