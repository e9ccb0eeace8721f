"""Samoyeds: matrices with a two-level pattern of zeros, in the arrays that GPU kernels and files use.

Names: ``samoyeds:N:M:V/VALUES``, for example ``samoyeds:1:2:32/bf16`` (75 % zeros),
``samoyeds:3:4:32/int4g32`` (62.5 %), ``samoyeds:1:1:32/bf16`` (2:4 alone, 50 %). VALUES:
``samoyeds_values.py``. The pattern: ``samoyeds_pattern.py``; what the arrays mean, index by index:
``samoyeds_arrays.py``. The same content in the order of the CPU kernels is ``samoyeds16:N:M:V/VALUES``
(``samoyeds_tiles.py``).

Source: Samoyeds: Accelerating MoE Models with Structured Sparsity Leveraging Sparse Tensor Cores, arXiv
2503.10725. Ours differ from its released arrays: ``sub`` is one byte and not four, the metadata lie in the
order of the tensor cores' fragments, rows and columns that do not divide evenly are filled up.

Bytes of a matrix ``(out, in)``, in this order, without gaps::

    K = in, filled up to a multiple of V and of 64       H = K / 2 values of a compressed row
    R = ceil(out / M) * N, filled up to a multiple of 16   S = K / V segments      G = ceil(H / group)

    values  [R, H]           bf16 or fp16; or uint8 codes; 4-bit codes two a byte, the first in the low nibble
    meta    [R/16, K/64, 32] int32: a tile of 16 compressed rows and 64 columns is 32 words, one a lane of
                             a warp. Word L holds, with h = L & 3 and r = L >> 2,
                                 low half:  columns 16h ... 16h + 15 of row r
                                 high half: the same columns of row r + 8
                             as four nibbles i0 | i1 << 2, the first group lowest. One load serves two
                             mma.sp::ordered_metadata.m16n8k32 instructions: columns 0-31 with selector 0,
                             columns 32-63 with selector 1.
    scales  [R, G]           fp16; only with codes
    sub     [S, R]           uint8, 0 ... M - 1; only if N < M

What fills up: values 0 (codes ``2^(bits-1)``), metadata 0b0100, scales 0, sub 0 ... N - 1. Every part starts
at a multiple of 16 bytes of the matrix. For bf16 values at 1:2:32 that is 4.625 bits for each weight of the
matrix, 3.46 times fewer bytes than dense bf16: 4 for the value that is kept of four weights, 0.5 for its
position, 0.125 for the sub-row. ``encode`` never prunes: a matrix without the pattern is refused.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats.codec import CHUNK, Shape, check_raw, check_rows, check_shape, check_weight, view_as
from gangline.formats.samoyeds_arrays import SparseArrays, check_arrays, compress, decompress
from gangline.formats.samoyeds_pattern import GROUP, SparsePattern
from gangline.formats.samoyeds_values import ValueKind

TILE = 16
_EMPTY = 0b0100
_LANES = 32


@dataclass(frozen=True)
class SparseContent:
    """Everything that a matrix consists of, in the canonical order; R is not filled up.

    Attributes:
        values_RH: numbers or uint8 codes.
        scales_RG: fp16, or None.
        sub_SR: uint8.
        meta_RQ: uint8, one group each.
    """

    values_RH: Tensor
    scales_RG: Tensor | None
    sub_SR: Tensor
    meta_RQ: Tensor

    def rows(self, start: int, stop: int) -> "SparseContent":
        """Some compressed rows; views."""
        scales_RG = None if self.scales_RG is None else self.scales_RG[start:stop]
        return SparseContent(
            self.values_RH[start:stop], scales_RG, self.sub_SR[:, start:stop], self.meta_RQ[start:stop]
        )


@dataclass(frozen=True)
class SparseCodec(ABC):
    """What both byte orders share.

    Attributes:
        pattern: which weights are kept.
        values: how they are stored.
    """

    pattern: SparsePattern
    values: ValueKind

    def __post_init__(self) -> None:
        if self.pattern.v % 16 or self.pattern.v > 256:
            raise FormatError(
                f"{self.name}: V must be a multiple of 16, at most 256; choose 16, 32, 64 or 128"
            )

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the codec."""

    @abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """See ``Codec.nbytes``."""

    @abstractmethod
    def read(self, raw: Tensor, shape: Shape) -> SparseContent:
        """What the bytes of a matrix hold; views of them where possible."""

    @abstractmethod
    def write(self, content: SparseContent, shape: Shape) -> Tensor:
        """Bytes (uint8, 1-D) of a matrix; the opposite of :meth:`read`."""

    @property
    def bits(self) -> float:
        """Value, scale, position and sub-row for each weight of a matrix that divides evenly."""
        pattern = self.pattern
        share = pattern.n / pattern.m
        sub = 8 / pattern.v if pattern.n < pattern.m else 0
        return share * ((self.values.bits + 2) / 2 + sub)

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See ``Codec.decode``; FormatError if positions or sub-rows cannot be."""
        content = self.read(raw, shape)
        check_arrays(SparseArrays(content.values_RH, content.sub_SR, content.meta_RQ), self.pattern)
        out_OI = torch.empty(shape, dtype=dtype, device=raw.device)
        step = self._step(shape)
        for start in range(0, shape[0], step * self.pattern.m):
            stop = min(start + step * self.pattern.m, shape[0])
            first = start // self.pattern.m * self.pattern.n
            part = content.rows(first, first + self.pattern.blocks(stop - start) * self.pattern.n)
            values_RH = self.values.dequantize(part.values_RH, part.scales_RG, dtype)
            arrays = SparseArrays(values_RH, part.sub_SR, part.meta_RQ)
            out_OI[start:stop] = decompress(arrays, self.pattern, (stop - start, shape[1]))
        return out_OI

    def encode(self, weight: Tensor) -> Tensor:
        """See ``Codec.encode``; FormatError if ``weight`` lacks the pattern: nothing is pruned here."""
        shape = check_weight(self.name, weight)
        step = self._step(shape) * self.pattern.m
        try:
            parts = [
                self._compress(weight[start : start + step].detach()) for start in range(0, shape[0], step)
            ]
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from error
        return self.write(_join(parts), shape)

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """See ``Codec.slice_rows``; a copy. FormatError if the range cuts a block of M rows."""
        check_rows(self.name, shape, start, stop)
        n, m = self.pattern.n, self.pattern.m
        if start % m or (stop % m and stop != shape[0]):
            raise FormatError(
                f"{self.name}: rows {start}:{stop} cut a block of {m} rows; choose multiples of {m}"
            )
        rows = self.read(raw, shape).rows(start // m * n, self.pattern.blocks(stop) * n)
        return self.write(rows, (stop - start, shape[1]))

    def _compress(self, w_OI: Tensor) -> SparseContent:
        arrays = compress(w_OI, self.pattern, self.pattern.columns(w_OI.shape[1]))
        values_RH, scales_RG = self.values.quantize(arrays.values_RH)
        return SparseContent(values_RH, scales_RG, arrays.sub_SR, arrays.meta_RQ)

    def _step(self, shape: Shape) -> int:
        """Blocks of M rows that are worked on at a time."""
        return max(1, CHUNK // (self.pattern.m * self.pattern.columns(shape[1])))


class SamoyedsCodec(SparseCodec):
    """``samoyeds:N:M:V/VALUES``; see the top of the file for the bytes."""

    @property
    def name(self) -> str:
        """For example ``samoyeds:1:2:32/bf16``."""
        return f"samoyeds:{self.pattern}/{self.values.name}"

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all parts."""
        return sum(self._sizes(check_shape(self.name, shape)))

    def read(self, raw: Tensor, shape: Shape) -> SparseContent:
        """See ``SparseCodec.read``."""
        filled, columns, real = self._extent(shape)
        raw = check_raw(self.name, raw, shape, self.nbytes(shape))
        values, meta, scales, sub = raw.split(self._sizes(shape))
        values_RH = _read_values(values, self.values).view(filled, columns // 2)
        scales_RG = view_as(scales, torch.float16).view(filled, -1) if self.values.group else None
        if self.pattern.n < self.pattern.m:
            sub_SR = sub.view(-1, filled)
        else:
            sub_SR = _in_order(columns // self.pattern.v, filled, self.pattern.n).to(raw.device)
        meta_RQ = meta_from_lanes(view_as(meta, torch.int32).view(filled // TILE, -1, _LANES))
        return SparseContent(values_RH, scales_RG, sub_SR, meta_RQ).rows(0, real)

    def write(self, content: SparseContent, shape: Shape) -> Tensor:
        """See ``SparseCodec.write``."""
        filled, _, real = self._extent(check_shape(self.name, shape))
        content = fill_rows(content, self.values, self.pattern, filled - real)
        values = content.values_RH
        if self.values.width == 4:
            values = values[:, ::2] | (values[:, 1::2] << 4)
        parts = [values, meta_to_lanes(content.meta_RQ)]
        if content.scales_RG is not None:
            parts.append(content.scales_RG)
        if self.pattern.n < self.pattern.m:
            parts.append(content.sub_SR)
        return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])

    def offsets(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """Position and bytes of ``values``, ``meta``, ``scales`` and ``sub``; an absent part has 0 bytes."""
        sizes = self._sizes(check_shape(self.name, shape))
        starts = [sum(sizes[:part]) for part in range(4)]
        return dict(zip(("values", "meta", "scales", "sub"), zip(starts, sizes, strict=True), strict=True))

    def _extent(self, shape: Shape) -> tuple[int, int, int]:
        """Compressed rows filled up, columns filled up, compressed rows of blocks."""
        real = self.pattern.blocks(shape[0]) * self.pattern.n
        return -(-real // TILE) * TILE, self.pattern.columns(shape[1]), real

    def _sizes(self, shape: Shape) -> list[int]:
        rows, columns, _ = self._extent(shape)
        segments = columns // self.pattern.v if self.pattern.n < self.pattern.m else 0
        scales = rows * self.values.groups(columns // 2) * 2
        return [rows * columns * self.values.width // 16, rows * columns // 8, scales, segments * rows]


def meta_to_lanes(meta_RQ: Tensor) -> Tensor:
    """Words (int32, ``(R/16, K/64, 32)``) of positions, in the order of the tensor cores' lanes."""
    words_TrhqL = _nibbles(meta_RQ).unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 4))
    low_TqrL, high_TqrL = (words_TrhqL[:, half].transpose(1, 2) for half in (0, 1))
    words_TqrL: Tensor = low_TqrL | (high_TqrL << 16)
    return words_TqrL.flatten(2).contiguous()


def meta_from_lanes(words_TqL: Tensor) -> Tensor:
    """The opposite of :func:`meta_to_lanes`."""
    words_TqrL = words_TqL.unflatten(2, (8, 4))
    halves_TrqL = [
        part.transpose(1, 2).flatten(2) for part in (words_TqrL & 0xFFFF, (words_TqrL >> 16) & 0xFFFF)
    ]
    words_RH = torch.stack(halves_TrqL, dim=1).flatten(0, 2)
    nibbles = [(words_RH >> shift) & 15 for shift in (0, 4, 8, 12)]
    return torch.stack(nibbles, dim=2).flatten(1).to(torch.uint8)


def fill_rows(content: SparseContent, values: ValueKind, pattern: SparsePattern, count: int) -> SparseContent:
    """The content with ``count`` compressed rows more that add nothing."""
    if count == 0:
        return content
    real = len(content.values_RH)
    device = content.values_RH.device
    sub_SR = _in_order(len(content.sub_SR), real + count, pattern.n).to(device)
    sub_SR[:, :real] = content.sub_SR
    more = content.values_RH.new_full((count, content.values_RH.shape[1]), values.zero)
    meta_RQ = content.meta_RQ.new_full((count, content.meta_RQ.shape[1]), _EMPTY)
    filled = replace(
        content,
        values_RH=torch.cat([content.values_RH, more]),
        sub_SR=sub_SR,
        meta_RQ=torch.cat([content.meta_RQ, meta_RQ]),
    )
    if content.scales_RG is None:
        return filled
    zeros_RG = content.scales_RG.new_zeros(count, content.scales_RG.shape[1])
    return replace(filled, scales_RG=torch.cat([content.scales_RG, zeros_RG]))


def _nibbles(meta_RQ: Tensor) -> Tensor:
    """Four groups in the low 16 bits of an int32 word."""
    parts_RH4: Tensor = meta_RQ.to(torch.int32).unflatten(1, (-1, GROUP))
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=meta_RQ.device)
    return (parts_RH4 << shifts).sum(dim=2, dtype=torch.int32)


def _in_order(segments: int, rows: int, n: int) -> Tensor:
    return (torch.arange(rows) % n).to(torch.uint8).repeat(segments, 1)


def _read_values(values: Tensor, kind: ValueKind) -> Tensor:
    if kind.width == 16:
        return view_as(values, kind.dtype)
    return values if kind.width == 8 else torch.stack([values & 15, values >> 4], dim=1).flatten()


def _join(parts: list[SparseContent]) -> SparseContent:
    scales = [part.scales_RG for part in parts if part.scales_RG is not None]
    return SparseContent(
        torch.cat([part.values_RH for part in parts]),
        torch.cat(scales) if scales else None,
        torch.cat([part.sub_SR for part in parts], dim=1),
        torch.cat([part.meta_RQ for part in parts]),
    )
