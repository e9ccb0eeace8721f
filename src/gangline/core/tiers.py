"""Where an expert's bytes can lie."""

from enum import IntEnum


class Tier(IntEnum):
    """Places for expert bytes, fastest first. HBM and PINNED are used only where a GPU is at hand."""

    HBM = 0
    PINNED = 1
    HOST = 2
    DISK = 3


class Priority(IntEnum):
    """Classes of read requests; a smaller number is served first (offloading survey design, section 2.2)."""

    DEMAND = 0
    CORRECTION = 1
    PREFETCH = 2
    BACKGROUND = 3
