"""Reads the whole predicted set of a pass in the order of its layers, as slots become free.

SiDA (arXiv 2310.18859) moves the set before the batch runs and waits for it. Here reading goes on beside
computing: layer 0 begins as soon as its own experts are there, and later layers are read meanwhile. Nothing
that a coming layer still needs is evicted for it, so a set larger than the slots streams through. Slots that
the present pass has no more use for take the set of the next one, as soon as that is known.
"""

import threading
from collections.abc import Collection, Sequence

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
        self._own: list[ExpertKey] = []  # of the layer that computes
        self._needed: list[ExpertKey] = []
        self._next: list[ExpertKey] = []
        self._lock = threading.Lock()

    def begin(self, needed: Sequence[ExpertKey]) -> None:
        """A pass begins that needs these experts, in the order of its layers."""
        with self._lock:
            self._own, self._needed, self._next = [], list(needed), []
            self._request()

    def advance(self, layer: int) -> None:
        """Layer ``layer`` begins; it will demand what it lacks itself."""
        with self._lock:
            self._own = [key for key in self._needed if key.layer == layer]
            self._needed = [key for key in self._needed if key.layer > layer]
            self._request()

    def follow(self, needed: Sequence[ExpertKey]) -> None:
        """The pass after the present one will need these; any thread may say so."""
        with self._lock:
            self._next = list(needed)
            self._request()

    def _request(self) -> None:
        """Read what the present pass lacks; if all of that is on its way, what the next one does."""
        reserved = len(self._own)
        kept = {*self._own, *self._needed}
        if self._fill(self._needed, self._slots - reserved, kept) and self._next:
            self._fill(self._next, self._slots - len(kept), kept | set(self._next))

    def _fill(self, wanted: Sequence[ExpertKey], slots: int, kept: Collection[ExpertKey]) -> bool:
        """Request what is missing of ``wanted`` into at most ``slots`` slots; whether that was all."""
        held = [self._store.holds(key) for key in wanted]
        room = slots - sum(held)
        for key, there in zip(wanted, held, strict=True):
            if there:
                continue
            if room <= 0 or not self._store.request(key, Priority.PREFETCH, kept=kept):
                return False
            room -= 1
        return True
