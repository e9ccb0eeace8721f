"""How well a missed expert is computed."""

from enum import IntEnum


class Precision(IntEnum):
    """Fidelity classes in ascending order. The store decides which codec stands behind HIGH and LOW."""

    SKIP = 0
    LOW = 1
    HIGH = 2
