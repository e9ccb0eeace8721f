"""Which device computes what, and in which order."""

from gangline.policies.schedule.fiddler import Fiddler
from gangline.policies.schedule.freetoken import FreeTokenSchedule, q_star, split, split_contended
from gangline.policies.schedule.hybrimoe import HybriMoESchedule, best_prefixes, two_ended
from gangline.policies.schedule.layer_ring import LayerRing, RingLoad, ring_seconds
from gangline.policies.schedule.protocol import Assignment, Place, Scheduler

__all__ = [
    "Assignment",
    "Fiddler",
    "FreeTokenSchedule",
    "HybriMoESchedule",
    "LayerRing",
    "Place",
    "RingLoad",
    "Scheduler",
    "best_prefixes",
    "q_star",
    "ring_seconds",
    "split",
    "split_contended",
    "two_ended",
]
