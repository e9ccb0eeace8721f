"""CRC-32 of expert bytes at the speed of memory, where the native core is built."""

import zlib
from typing import Any

import numpy as np

from gangline.kernels.cpu import native


def crc32(data: Any, crc: int = 0) -> int:
    """Return ``zlib.crc32(data, crc)``.

    Args:
        data: contiguous bytes: ``bytes``, a memoryview, a NumPy array.
        crc: what the bytes before gave.
    """
    core = native()
    if core is None:
        return zlib.crc32(data, crc)
    return int(core.crc32(np.frombuffer(data, dtype=np.uint8), crc))
