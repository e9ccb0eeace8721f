"""Reads the whole predicted set of a pass in the order of its layers, as slots become free.

SiDA (arXiv 2310.18859) moves the set before the batch runs and waits for it. Here reading goes on beside
computing: layer 0 begins as soon as its own experts are there, and later layers are read meanwhile. Nothing
that a coming layer still needs is evicted for it, so a set larger than the slots streams through.
"""

from collections.abc import Sequence

from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.runtime.store import ExpertStore


class SetFetcher:
    """Requests experts from the store, never more than its slots can hold beside what is still needed.

    Args:
        store: of the model.
        slots: expert slots in all.
    """

    def __init__(self, store: ExpertStore, slots: int) -> None:
        self._store, self._slots = store, slots
        self._needed: list[ExpertKey] = []

    def begin(self, needed: Sequence[ExpertKey]) -> None:
        """A pass begins that needs these experts, in the order of its layers."""
        self._needed = list(needed)
        self._request(reserved=0)

    def advance(self, layer: int) -> None:
        """Layer ``layer`` begins; it will demand what it lacks itself."""
        own = sum(key.layer == layer for key in self._needed)
        self._needed = [key for key in self._needed if key.layer > layer]
        self._request(reserved=own)

    def _request(self, reserved: int) -> None:
        held = [self._store.holds(key) for key in self._needed]
        room = self._slots - reserved - sum(held)
        for key, there in zip(self._needed, held, strict=True):
            if room <= 0:
                return
            if not there:
                if not self._store.request(key, Priority.PREFETCH):
                    return
                room -= 1
