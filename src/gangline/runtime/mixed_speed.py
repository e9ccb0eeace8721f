"""How often the rule of two precisions is expected to choose the lower one, for a speed before any run.

The rule chooses by the routers' weights, which no header tells. One end: the experts of a token weigh alike,
which keeps the most of them in high precision. The other: the weight of a rank is one part in its number
(Zipf's law), a little more unequal than in Mixtral, where the paper's thresholds keep 67 % of the choices in
high precision and leave 3 % out; this keeps 50 % and leaves none out.
"""

from dataclasses import dataclass

from gangline.core.precision import Precision
from gangline.runtime.footprint import Footprint
from gangline.runtime.planner import MemoryPlan

_SKEWS = (0.0, 1.0)


@dataclass(frozen=True)
class Wanted:
    """What the rule wants of the experts of a token, as shares of them: ``high``, ``low``, the rest not."""

    high: float = 1.0
    low: float = 0.0

    def computed_low(self, hit: float) -> float:
        """Share of all experts that is computed in low precision where ``hit`` of them are there in high."""
        return self.low * (1 - hit)

    def skipped(self, hit: float) -> float:
        """Share that is left out."""
        return max(0.0, 1 - self.high - self.low) * (1 - hit)


def wanted(plan: MemoryPlan, footprint: Footprint) -> tuple[Wanted, Wanted]:
    """Return the shares for experts that weigh alike, and for unequal ones; without copies all are high."""
    copies = footprint.copies
    if not plan.low_slots or copies is None:
        return Wanted(), Wanted()
    alike, unequal = (
        [
            precision
            for layer in footprint.geometry.layers
            for precision in copies.rule.by_weight([(1 + rank) ** -skew for rank in range(layer.top_k)])
        ]
        for skew in _SKEWS
    )
    return _shares(alike), _shares(unequal)


def low_share(plan: MemoryPlan) -> float:
    """Return the share of all copies in low precision that have a slot."""
    return min(1.0, sum(count for _, count, _ in plan.low_slots) / plan.experts_total)


def copy_bytes_per_token(footprint: Footprint) -> int:
    """Return the bytes of copies of the experts that one token uses."""
    if footprint.copies is None:
        return 0
    layers = footprint.geometry.layers
    return sum(size * layer.top_k for size, layer in zip(footprint.copies.slots, layers, strict=True))


def _shares(chosen: list[Precision]) -> Wanted:
    return Wanted(chosen.count(Precision.HIGH) / len(chosen), chosen.count(Precision.LOW) / len(chosen))
