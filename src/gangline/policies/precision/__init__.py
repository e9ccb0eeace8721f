"""At which precision a missed expert runs, or whether it runs at all. Changes outputs: always opt-in."""

from gangline.policies.precision.hobbit import HobbitPrecision
from gangline.policies.precision.mixed import Mixed, divide_slots, low_precision, make_mixed
from gangline.policies.precision.protocol import PrecisionPolicy

__all__ = [
    "HobbitPrecision",
    "Mixed",
    "PrecisionPolicy",
    "divide_slots",
    "low_precision",
    "make_mixed",
]
