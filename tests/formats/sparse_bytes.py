"""Slow readers of sparse matrices, one number at a time, written from the descriptions of the layouts."""

import numpy as np
import torch
from torch import Tensor

from gangline.formats.samoyeds_pattern import SparsePattern
from gangline.formats.samoyeds_values import ValueKind


def parse(name: str) -> tuple[SparsePattern, ValueKind]:
    """Pattern and kind of values of a codec's name."""
    pattern, values = name.partition(":")[2].split("/")
    return SparsePattern.parse(pattern), ValueKind.parse(values)


def _number(raw: bytes, at: int, kind: ValueKind, nibble: int = 0) -> float:
    if kind.width == 16:
        return float(torch.frombuffer(bytearray(raw[at : at + 2]), dtype=kind.dtype)[0])
    code = raw[at] if kind.width == 8 else (raw[at] >> 4 * nibble) & 15
    return code - 2 ** (kind.width - 1)


def _half(raw: bytes, at: int) -> float:
    return float(np.frombuffer(raw[at : at + 2], dtype="<f2")[0])


def read_canonical(raw: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """The dense matrix of ``samoyeds:`` bytes."""
    pattern, kind = parse(name)
    data, columns = bytes(raw.numpy()), pattern.columns(shape[1])
    rows = -(-shape[0] // pattern.m) * pattern.n
    filled, half, segments = -(-rows // 16) * 16, columns // 2, columns // pattern.v
    groups = -(-half // kind.group) if kind.group else 0
    meta = filled * half * kind.width // 8
    scales = meta + filled * columns // 8
    subs = scales + 2 * filled * groups
    out = torch.zeros(-(-shape[0] // pattern.m) * pattern.m, columns)
    for r in range(rows):
        for c in range(half):
            quad, slot = c // 2, c % 2
            tile, block, lane_column = r // 16, quad // 16, quad % 16 // 4
            lane = (r % 8) * 4 + lane_column
            at = meta + 4 * ((tile * (columns // 64) + block) * 32 + lane)
            word = int.from_bytes(data[at : at + 4], "little") >> (16 if r % 16 >= 8 else 0)
            position = (word >> 4 * (quad % 4) >> 2 * slot) & 3
            sub = 0
            if pattern.n < pattern.m:
                sub = data[subs + (2 * c // pattern.v) * filled + r]
            value = _number(data, (r * half + c) * kind.width // 8, kind, c % 2)
            if kind.group:
                value *= _half(data, scales + 2 * (r * groups + c // kind.group))
            row = r // pattern.n * pattern.m + (sub if pattern.n < pattern.m else r % pattern.n)
            out[row, 4 * quad + position] = value
    assert len(data) == subs + (segments * filled if pattern.n < pattern.m else 0)
    return out[: shape[0], : shape[1]]


def multiply_tiles(raw: Tensor, shape: tuple[int, int], name: str, x_I: Tensor) -> Tensor:
    """``W x`` (float64) of ``samoyeds16:`` bytes as a kernel goes about it: lanes, steps, accumulators."""
    pattern, kind = parse(name)
    data, columns = bytes(raw.numpy()), pattern.columns(shape[1])
    n, m, lanes, segments = pattern.n, pattern.m, 16 // pattern.n * pattern.n, columns // pattern.v
    groups = -(-columns // 2 // kind.group) if kind.group else 0
    shifts = 32 * groups
    head = -(-(shifts + (16 * segments if n < m else 0)) // 64) * 64
    step_bytes = 64 + 32 * kind.width
    tile_rows, tile_bytes = 16 // n * m, head + columns // 32 * step_bytes
    x = torch.zeros(columns, dtype=torch.float64)
    x[: shape[1]] = x_I
    y = torch.zeros(-(-shape[0] // tile_rows) * tile_rows, dtype=torch.float64)
    for tile in range(len(y) // tile_rows):
        start = tile * tile_bytes
        for lane in range(lanes):
            for column in range(0, columns, 4):
                step, quad = column // 32, column % 32 // 4
                at = start + head + step * step_bytes
                word = int.from_bytes(data[at + 4 * lane : at + 4 * lane + 4], "little")
                scale = (
                    _half(data, start + 2 * (16 * (step * 16 // kind.group) + lane)) if kind.group else 1.0
                )
                shift = data[start + shifts + 16 * (column // pattern.v) + lane] if n < m else 0
                row = tile * tile_rows + lane // n * m + lane % n + shift
                for slot in (0, 1):
                    plane = 2 * (quad // 4) + slot
                    byte = (word >> 2 * plane >> 8 * (quad % 4)) & 3
                    assert byte == (word >> (8 * (quad % 4) + 4 * (quad // 4)) >> 2 * slot) & 3
                    if kind.width == 16:
                        where, nibble = at + 64 + 64 * quad + 4 * lane + 2 * slot, 0
                    elif kind.width == 8:
                        where, nibble = at + 64 + 64 * plane + 4 * lane + quad % 4, 0
                    else:
                        where, nibble = at + 64 + 64 * (plane // 2) + 4 * lane + quad % 4, plane % 2
                    y[row] += scale * _number(data, where, kind, nibble) * x[column + byte]
    assert len(data) == len(y) // tile_rows * tile_bytes
    return y[: shape[0]]
