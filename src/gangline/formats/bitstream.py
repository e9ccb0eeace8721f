"""Small unsigned codes as a little-endian bit stream, the packing of the compressed-tensors format.

Element i of a row occupies the bits ``[i*b, i*b+b)`` of the row, least significant first, and every row
starts on a 32-bit word. Bytes are spread into one code a byte inside wider integers, so that no index tensor
is ever made.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# For each width: bytes that hold whole codes, and the integer with one byte for each of these codes.
_UNITS: dict[int, tuple[int, torch.dtype]] = {
    1: (1, torch.int64),
    2: (1, torch.int32),
    3: (3, torch.int64),
    4: (1, torch.int16),
    6: (3, torch.int32),
}


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row: whole 32-bit words."""
    return -(-columns * bits // 32) * 4


def unpack(packed_OB: Tensor, columns: int, bits: int) -> Tensor:
    """Codes ``(rows, columns)`` uint8 from packed rows (uint8) as ``pack`` makes them."""
    if bits == 8:
        return packed_OB[:, :columns]
    unit, wide = _UNITS[bits]
    if unit == 1:
        word = packed_OB.to(wide)
    else:
        rows, width = packed_OB.shape
        parts = pad(packed_OB, (0, -width % unit)).view(rows, -1, unit).to(wide)
        word = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
    for codes, lower in _halves(bits, wide.itemsize):
        upper = (word << (8 - bits) * codes).bitwise_and_(lower << 8 * codes)
        word = word.bitwise_and_(lower).bitwise_or_(upper)
    return word.view(torch.uint8)[:, :columns]


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Packed rows ``(rows, row_bytes)`` uint8 of codes in ``[0, 2^bits)`` (uint8); spare bits are zero."""
    rows, columns = codes_OI.shape
    width = row_bytes(columns, bits)
    if bits == 8:
        return pad(codes_OI, (0, width - columns))
    unit, wide = _UNITS[bits]
    units = -(-width // unit)
    codes_OI = pad(codes_OI, (0, units * wide.itemsize - columns)).contiguous()
    word = codes_OI.view(wide)
    for codes, lower in reversed(_halves(bits, wide.itemsize)):
        upper = (word >> (8 - bits) * codes).bitwise_and_(lower << bits * codes)
        word = word.bitwise_and(lower).bitwise_or_(upper)
    packed_OB = word.contiguous().view(torch.uint8).view(rows, units, -1)[..., :unit].reshape(rows, -1)
    return packed_OB[:, :width].contiguous()


def _halves(bits: int, total: int) -> list[tuple[int, int]]:
    """The steps that spread ``total`` codes, which lie side by side, to a byte each.

    Every step halves runs of codes and moves the upper half up. Given are the codes of a half, and the mask
    of the lower halves once they have their bytes' distance.
    """
    steps = []
    codes = total // 2
    while codes:
        run = (1 << bits * codes) - 1
        steps.append((codes, sum(run << 8 * start for start in range(0, total, 2 * codes))))
        codes //= 2
    return steps


def planes(packed_NB: Tensor, run: int, bits: int) -> Tensor:
    """Codes ``(N, B * 8 / bits)`` uint8 in ggml's order, from contiguous bytes ``(N, B)``.

    Within every ``run`` bytes (a multiple of 8) come first the lowest ``bits`` of each byte, then the next
    lowest of each, and so on.
    """
    word = packed_NB.view(torch.int64).view(len(packed_NB), -1, run // 8)
    mask = 0x01010101_01010101 * (2**bits - 1)
    parts = [(word >> shift).bitwise_and_(mask) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=2).view(len(packed_NB), -1).view(torch.uint8)
