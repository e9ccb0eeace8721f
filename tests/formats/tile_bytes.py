"""Tiles read byte by byte from the words of the layout: slow, and independent of the codecs."""

import struct

import numpy as np
from torch import Tensor


def parse(name: str) -> tuple[int, int, bool]:
    """Width, group and whether there are zero points of a ``tile16:`` codec."""
    if name == "tile16:mxfp4":
        return 4, 32, False
    width, group = name.removeprefix("tile16:int").rstrip("zd").split("g")
    return int(width), int(group), name.endswith("z")


def read_tiles(name: str, raw: Tensor, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``(out, in)``, scales and zero points ``(out, groups)``."""
    width, group, has_zeros = parse(name)
    mx = name == "tile16:mxfp4"
    data = raw.numpy().tobytes()
    rows, columns = shape
    groups = -(-columns // group)
    byte_scales = name.endswith("d")
    entry = 1 if mx or byte_scales else 2
    first = 64 if byte_scales else 0

    def head_of(count: int) -> int:
        used = count * 16 * (entry + has_zeros)
        return used + -used % 64

    stripe_bytes = head_of(4) + 4 * 2 * group * width
    rest = groups % 4
    block_bytes = first + groups // 4 * stripe_bytes + head_of(rest) + 2 * rest * group * width
    assert len(data) == -(-rows // 16) * block_bytes
    codes = np.zeros(shape, dtype=np.int64)
    scales, zeros = np.zeros((rows, groups)), np.zeros((rows, groups), dtype=np.int64)
    for row in range(rows):
        block, r = data[row // 16 * block_bytes : (row // 16 + 1) * block_bytes], row % 16
        for g in range(groups):
            inside, count = g % 4, min(4, groups - g // 4 * 4)
            stripe = block[first + g // 4 * stripe_bytes :]
            at = 16 * inside + r
            if byte_scales:
                row_scale, byte = (
                    struct.unpack_from("<f", block, 4 * r)[0],
                    struct.unpack_from("<b", stripe, at)[0],
                )
                scales[row, g] = np.float32(row_scale) * np.float32(byte)
            else:
                scales[row, g] = stripe[at] if mx else struct.unpack_from("<e", stripe, 2 * at)[0]
            zeros[row, g] = stripe[32 * count + at] if has_zeros else (0 if mx else 2 ** (width - 1))
            bytes_of_group = stripe[head_of(count) + 2 * inside * group * width :][: 2 * group * width]
            for c in range(min(group, columns - g * group)):
                codes[row, g * group + c] = _code(bytes_of_group, width, group, c, 4 * r + c % 4)
    return codes, scales, zeros


def _code(data: bytes, width: int, group: int, column: int, position: int) -> int:
    quad = column // 4
    if width == 8:
        return data[64 * quad + position]
    if width == 4:
        return data[64 * (quad // 2) + position] >> 4 * (quad % 2) & 15
    if width == 6:
        low = _code(data, 4, group, column, position)
        return low | _code(data[64 * (group // 8) :], 2, group, column, position) << 4
    low = data[64 * (quad // 4) + position] >> 2 * (quad % 4) & 3
    if width == 2:
        return low
    high = data[64 * (group // 4 // 4) + 64 * (quad // 8) + position] >> quad % 8 & 1
    return low | high << 2
