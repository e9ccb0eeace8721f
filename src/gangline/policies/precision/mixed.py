"""Experts in two precisions: the rule that chooses, and how the second one is stored.

"HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference" (arXiv 2411.01433) keeps a pool of
slots for each precision. Both take their bytes from one budget.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gangline.core.errors import UsageError
from gangline.policies.precision.hobbit import HobbitPrecision

RULES = {"HobbitPrecision": HobbitPrecision}


@dataclass(frozen=True)
class Mixed:
    """A second precision.

    Attributes:
        rule: says which expert of an event is computed in which precision.
        bits: precision of the copies, a name like ``int2``; None follows from that of the experts.
        share: part of the slot bytes that copies get.
    """

    rule: HobbitPrecision
    bits: str | None = None
    share: float = 0.25


def make_mixed(name: str, options: Mapping[str, Any]) -> Mixed:
    """Build a second precision from the name of its rule and all parameters.

    Args:
        name: a key of ``RULES``.
        options: ``bits``, ``share``, and the parameters of the rule.

    Raises:
        UsageError: a name is not known, or a value is out of its range.
    """
    if name not in RULES:
        raise UsageError(f"no precision rule is called {name!r}; choose one of {', '.join(RULES)}")
    known = [*inspect.signature(RULES[name]).parameters, "bits", "share"]
    if unknown := sorted(set(options).difference(known)):
        raise UsageError(f"{name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    rest = dict(options)
    bits, share = rest.pop("bits", None), rest.pop("share", 0.25)
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise UsageError(f"share {share!r} of the slots in low precision must be between 0 and 1")
    if bits is not None and not isinstance(bits, str):
        raise UsageError(f"bits {bits!r} must be the name of a precision, for example int2")
    return Mixed(RULES[name](**rest), bits, float(share))


def low_precision(bits: float) -> str:
    """Return the precision of the copies of experts whose weights have so many bits.

    The paper pairs 16 bits with 4, and 8 with 2.
    """
    return "int4" if bits > 12 else "int2"


def divide_slots(slots: int, high_bytes: int, low_bytes: int, share: float, experts: int) -> tuple[int, int]:
    """Return the slots of both precisions in the bytes of ``slots`` slots of the high one.

    Args:
        slots: of the high precision if there were no other; at least 2 for both to find room.
        high_bytes, low_bytes: of one slot.
        share: of the bytes, for the low precision.
        experts: that the slots are for; neither precision gets more.
    """
    room = slots * high_bytes
    low = min(experts, max(1, int(min(room * share, room - high_bytes)) // low_bytes))
    return min(experts, max(1, (room - low * low_bytes) // high_bytes)), low
