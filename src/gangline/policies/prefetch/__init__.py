"""Which experts to read before somebody waits for them."""

from gangline.policies.prefetch.all_later import AllLater
from gangline.policies.prefetch.by_gain import ByGain
from gangline.policies.prefetch.fate import FatePrefetch, overlap_budget
from gangline.policies.prefetch.first_missing import FirstMissing
from gangline.policies.prefetch.horizon import AdaptiveHorizon
from gangline.policies.prefetch.plec import Plec, correction, share_slots
from gangline.policies.prefetch.protocol import Fetch, Holds, Prefetcher
from gangline.policies.prefetch.registry import PREFETCHERS, make_prefetcher
from gangline.policies.prefetch.whole_set import WholeSet

__all__ = [
    "PREFETCHERS",
    "AdaptiveHorizon",
    "AllLater",
    "ByGain",
    "FatePrefetch",
    "Fetch",
    "FirstMissing",
    "Holds",
    "Plec",
    "Prefetcher",
    "WholeSet",
    "correction",
    "make_prefetcher",
    "overlap_budget",
    "share_slots",
]
