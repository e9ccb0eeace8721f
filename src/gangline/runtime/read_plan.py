"""Turn the extents of one expert into aligned reads and places in its slot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gangline.core.layout import ExpertCatalog, Extent
from gangline.runtime.files import ALIGN

CHUNK = 4 << 20


class Chunk(NamedTuple):
    """One read: ``length`` bytes at ``offset`` of ``file`` to ``place`` in the slot; ``wanted`` of them must
    exist.
    """

    file: int
    offset: int
    length: int
    wanted: int
    place: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """All reads of one expert.

    Attributes:
        chunks: aligned reads of at most ``CHUNK`` bytes, in slot order.
        fields: place and length of every field in the slot.
        nbytes: slot bytes that the reads cover.
        payload: bytes of the fields.
    """

    chunks: tuple[Chunk, ...]
    fields: tuple[tuple[int, int], ...]
    nbytes: int
    payload: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "payload", sum(nbytes for _, nbytes in self.fields))


def plan_reads(extents: Sequence[Extent], align: int) -> ReadPlan:
    """Merge extents that touch into one run each, widen every run to ``align``, and cut it into chunks.

    A field keeps the offset within a page that it has in its file. So a read needs no copy, and the address
    of an expert modulo the page size is the same in every slot: a kernel sees the same alignment wherever it
    lies.
    """
    chunks: list[Chunk] = []
    fields: list[tuple[int, int]] = []
    place = 0
    index = 0
    while index < len(extents):
        last = index
        while last + 1 < len(extents) and _touch(extents[last], extents[last + 1]):
            last += 1
        start, end = extents[index].offset, extents[last].offset + extents[last].nbytes
        base = start - start % align
        for extent in extents[index : last + 1]:
            fields.append((place + extent.offset - base, extent.nbytes))
        length = -(-(end - base) // align) * align
        for cut in range(0, length, CHUNK):
            size = min(CHUNK, length - cut)
            chunks.append(
                Chunk(extents[index].file, base + cut, size, min(size, end - base - cut), place + cut)
            )
        place += -(-length // 64) * 64
        index = last + 1
    return ReadPlan(tuple(chunks), tuple(fields), place)


def read_sizes(catalog: ExpertCatalog, align: int) -> list[int]:
    """Return, for each layer, the slot bytes that its largest expert needs."""
    sizes = [0] * len(catalog.layouts)
    for key, extents in catalog.extents.items():
        sizes[key.layer] = max(sizes[key.layer], -(-plan_reads(extents, align).nbytes // ALIGN) * ALIGN)
    return sizes


def _touch(a: Extent, b: Extent) -> bool:
    return a.file == b.file and a.offset + a.nbytes == b.offset
