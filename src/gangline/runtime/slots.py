"""Slots: places of one size for one expert each, in one anonymous mapping."""

import mmap
from collections.abc import Hashable, Iterator, Sequence
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gangline.core.errors import BudgetError
from gangline.core.keys import ExpertKey
from gangline.core.sizes import format_size
from gangline.kernels.cpu.huge_pages import map_anonymous
from gangline.policies.caches import CachePolicy
from gangline.runtime.readers import Ticket

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 32 << 20  # of memory that is taken at once


class SlotState(Enum):
    """What a slot holds: nothing, bytes on their way, or a whole expert."""

    FREE = auto()
    LOADING = auto()
    READY = auto()


class Slot:
    """One place for one expert. ``leases`` counts the consumers that forbid eviction.

    ``draining`` is a read for an expert that gave up the slot before its bytes were there, and that could not
    be stopped; ``queued`` the read that waits for it. ``bound`` is the last thing made over its bytes, with
    its form and the places of the fields.
    """

    __slots__ = ("bound", "draining", "error", "key", "leases", "offset", "queued", "state", "weights")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.state = SlotState.FREE
        self.key: ExpertKey | None = None
        self.leases = 0
        self.weights: Any = None
        self.error: Exception | None = None
        self.draining: Ticket | None = None
        self.queued: Ticket | None = None
        self.bound: tuple[Hashable, tuple[tuple[int, int], ...], Any] | None = None


class SlotPool:
    """Slots of equal size for the layers whose experts have that size, with their cache policy.

    The mapping takes physical pages only as slots are filled, huge ones: direct reads pin fewer of them too.

    Raises:
        BudgetError: the address space for the slots cannot be mapped.
    """

    def __init__(self, slot_bytes: int, count: int, policy: CachePolicy) -> None:
        self.slot_bytes = slot_bytes
        self.policy = policy
        self.resize(count)

    def resize(self, count: int) -> None:
        """Have so many slots, all free: nothing may have been read yet.

        Raises:
            BudgetError: see above.
        """
        self.slots = [Slot(index * self.slot_bytes) for index in range(count)]
        self.free = self.slots[::-1]
        try:
            self._map = map_anonymous(self.slot_bytes * count)
        except OSError as error:
            raise BudgetError(
                f"cannot map {format_size(self.slot_bytes * count)} for expert slots: {error}"
            ) from error
        self.view = memoryview(self._map)
        self.address = int(np.frombuffer(self._map, dtype=np.uint8).ctypes.data)

    def take_pages(self) -> Iterator[int]:
        """Take all physical pages piece by piece, in this thread and mostly without holding the interpreter.

        Where a read does that, the system holds the lock of the whole address space for every page, and a
        thread that imports libraries meanwhile waits for it at every file that it maps. Nothing may have been
        read into the slots yet. Yields the bytes of each piece.
        """
        whole = np.frombuffer(self._map, dtype=np.uint8)
        for begin in range(0, len(whole), _PIECE):
            piece = whole[begin : begin + _PIECE]
            piece[:: mmap.PAGESIZE] = 0
            yield len(piece)

    @cached_property
    def _bytes(self) -> "Tensor":
        import torch  # not before: reading may begin while it is still being imported

        return torch.frombuffer(self._map, dtype=torch.uint8)

    def raw(self, slot: Slot, fields: Sequence[tuple[int, int]]) -> "tuple[Tensor, ...]":
        """Return the fields of a slot as uint8 tensors over its bytes."""
        base = slot.offset
        return tuple(self._bytes[base + place : base + place + nbytes] for place, nbytes in fields)
