"""Tiles of 16 rows: the byte order in which the native kernels read a matrix, front to back.

A matrix is a run of row blocks of 16 rows. One row block is a run of *stripes* of four groups of columns (the
last may have fewer), so that scales lie beside their codes and a kernel reads one stream from end to end. If
scales are signed bytes, a row block begins with the fp32 scales of its 16 rows. One stripe is:

1. the scales of its groups, group after group, 16 rows each (fp16, E8M0 bytes, or signed bytes);
2. with zero points: as many bytes, in the same order;
3. zeros up to a multiple of 64 bytes (of four groups there are none to add);
4. the codes, group after group. Four consecutive columns of the 16 rows are a *quad* of 64 positions:
   position ``4 r + j`` is row ``r``, column ``j``.

   - 8 bits: a quad is 64 bytes.
   - 4 bits: 64 bytes hold two quads, the first in the low nibbles.
   - 2 bits: 64 bytes hold four quads, the first in the lowest bits.
   - 3 bits: the low two bits of all quads of the group as above, then the high bits, eight quads in 64 bytes.
   - 6 bits: the low four bits of all quads of the group as above, then the two high bits of all as above.

Rows past the end have scale 0, columns past the end the code of zero, so that they add nothing.

Shapes: R row blocks, S the 16 rows of one, N stripes, B bytes, G groups of a row, Q quads of a row, W 32-bit
words (a word is one quad of one row), C columns filled up to whole groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.formats.codec import Shape

ROWS = 16
STRIPE_GROUPS = 4
_QUAD = 4
_ALIGN = 64
# Widths whose codes are stored in two parts: bits of the low one and of the high one.
_SPLIT = {3: (2, 1), 6: (4, 2)}


@dataclass(frozen=True)
class TileParts:
    """The parts of encoded row blocks.

    Attributes:
        scales_RGS: fp16, uint8 exponents, or int8 in units of the rows' scales.
        zeros_RGS: uint8 zero points, or None.
        words_RW: the codes of each row block, int32.
        row_scales_RS: fp32, or None.
    """

    scales_RGS: Tensor
    zeros_RGS: Tensor | None
    words_RW: Tensor
    row_scales_RS: Tensor | None = None


@dataclass(frozen=True)
class TileLayout:
    """Where everything lies.

    Attributes:
        width: bits of a code.
        group: columns that share a scale, a multiple of 32.
        scale: dtype of the scales.
        has_zeros: whether there are zero points.
    """

    width: int
    group: int
    scale: torch.dtype
    has_zeros: bool

    @property
    def row_scale_bytes(self) -> int:
        """Bytes before the first stripe of a row block: the scales of its rows, if it has them."""
        return ROWS * torch.float32.itemsize if self.scale == torch.int8 else 0

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return -(-columns // self.group)

    def columns(self, columns: int) -> int:
        """Columns with those that fill the last group."""
        return self.groups(columns) * self.group

    def head_bytes(self, groups: int) -> int:
        """Bytes of a stripe of so many groups before its codes."""
        used = groups * ROWS * (self.scale.itemsize + self.has_zeros)
        return -(-used // _ALIGN) * _ALIGN

    def stripe_bytes(self, groups: int) -> int:
        """Bytes of a stripe of so many groups: a multiple of 64."""
        return self.head_bytes(groups) + groups * self.group * ROWS * self.width // 8

    def block_bytes(self, columns: int) -> int:
        """Bytes of a row block: a multiple of 64."""
        stripes, rest = divmod(self.groups(columns), STRIPE_GROUPS)
        whole = stripes * self.stripe_bytes(STRIPE_GROUPS)
        return self.row_scale_bytes + whole + self.stripe_bytes(rest)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of a matrix."""
        return row_blocks(shape[0]) * self.block_bytes(shape[1])

    def read(self, raw_RB: Tensor, columns: int) -> TileParts:
        """Return copies of the parts of row blocks (uint8)."""
        if raw_RB.data_ptr() % 4 or raw_RB.storage_offset() % 4:
            raw_RB = raw_RB.clone()
        blocks = len(raw_RB)
        scales, zeros, words = [], [], []
        for stripes_RNB, groups in self._stripes(raw_RB, columns):
            scale_RNB, zero_RNB, codes_RNB = self._parts(stripes_RNB, groups)
            scales.append(scale_RNB.view(self.scale).reshape(blocks, -1, ROWS))
            zeros.append(zero_RNB.reshape(blocks, -1, ROWS))
            words.append(codes_RNB.view(torch.int32).reshape(blocks, -1))
        zeros_RGS = torch.cat(zeros, dim=1) if self.has_zeros else None
        rows_RS = self._row_scales(raw_RB).clone() if self.row_scale_bytes else None
        return TileParts(torch.cat(scales, dim=1), zeros_RGS, torch.cat(words, dim=1), rows_RS)

    def write(self, raw_RB: Tensor, columns: int, parts: TileParts) -> None:
        """Put the parts of row blocks into their bytes (uint8, zeroed), of which there are as many."""
        if parts.row_scales_RS is not None:
            self._row_scales(raw_RB).copy_(parts.row_scales_RS)
        group = word = 0
        for stripes_RNB, groups in self._stripes(raw_RB, columns):
            scale_RNB, zero_RNB, codes_RNB = self._parts(stripes_RNB, groups)
            several = slice(group, group + groups * stripes_RNB.shape[1])
            scales_RNW, words_RNW = scale_RNB.view(self.scale), codes_RNB.view(torch.int32)
            scales_RNW.copy_(parts.scales_RGS[:, several].reshape(scales_RNW.shape))
            if parts.zeros_RGS is not None:
                zero_RNB.copy_(parts.zeros_RGS[:, several].reshape(zero_RNB.shape))
            count = words_RNW[0].numel()
            words_RNW.copy_(parts.words_RW[:, word : word + count].reshape(words_RNW.shape))
            group, word = several.stop, word + count

    def _row_scales(self, raw_RB: Tensor) -> Tensor:
        return raw_RB[:, : self.row_scale_bytes].view(torch.float32)

    def _stripes(self, raw_RB: Tensor, columns: int) -> Iterator[tuple[Tensor, int]]:
        """Yield views of stripes of equally many groups, and how many: the whole ones, then what is left."""
        stripes, rest = divmod(self.groups(columns), STRIPE_GROUPS)
        begin = self.row_scale_bytes
        split = begin + stripes * self.stripe_bytes(STRIPE_GROUPS)
        if stripes:
            yield raw_RB[:, begin:split].unflatten(1, (stripes, -1)), STRIPE_GROUPS
        if rest:
            yield raw_RB[:, split:].unflatten(1, (1, -1)), rest

    def _parts(self, stripes_RNB: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes of the scales, of the zero points (perhaps none) and of the codes."""
        scales = groups * ROWS * self.scale.itemsize
        zeros = groups * ROWS * self.has_zeros
        return (
            stripes_RNB[..., :scales],
            stripes_RNB[..., scales : scales + zeros],
            stripes_RNB[..., self.head_bytes(groups) :],
        )

    def unpack(self, words_RW: Tensor) -> Tensor:
        """Codes ``(R, 16, C)``, uint8, of row blocks."""
        blocks = len(words_RW)
        if self.width in _SPLIT:
            low, high = _SPLIT[self.width]
            words_NW = words_RW.reshape(-1, self.group * self.width // 2)
            end = self.group * low // 2
            low_NQS, high_NQS = _spread(words_NW[:, :end], low), _spread(words_NW[:, end:], high)
            words_QS = (low_NQS | (high_NQS << low)).view(blocks, -1, ROWS)
        else:
            words_QS = _spread(words_RW, self.width)
        return words_QS.transpose(1, 2).contiguous().view(torch.uint8)

    def pack(self, codes_RSC: Tensor) -> Tensor:
        """Words ``(R, W)`` of codes as :meth:`unpack` gives them; no code may be past ``width`` bits."""
        words_RQS = codes_RSC.contiguous().view(torch.int32).transpose(1, 2)
        if self.width not in _SPLIT:
            return _gather(words_RQS.contiguous(), self.width)
        low, high = _SPLIT[self.width]
        words_NQS = words_RQS.reshape(-1, self.group // _QUAD, ROWS)
        low_NW = _gather(words_NQS & _in_bytes(low), low)
        high_NW = _gather((words_NQS >> low) & _in_bytes(high), high)
        return torch.cat([low_NW, high_NW], dim=1).view(len(codes_RSC), -1)


def row_blocks(rows: int) -> int:
    """Row blocks that hold ``rows``."""
    return -(-rows // ROWS)


def _in_bytes(bits: int) -> int:
    """A word whose bytes all have so many low bits set."""
    return ((1 << bits) - 1) * 0x01010101


def _spread(words_NW: Tensor, bits: int) -> Tensor:
    """Quads ``(N, Q, 16)``, one code a byte, of words that hold ``8 / bits`` quads each."""
    if bits == 8:
        return words_NW.reshape(len(words_NW), -1, ROWS)
    words_NPS = words_NW.reshape(len(words_NW), -1, ROWS)
    parts = [(words_NPS >> shift).bitwise_and_(_in_bytes(bits)) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=2).view(len(words_NW), -1, ROWS)


def _gather(words_NQS: Tensor, bits: int) -> Tensor:
    """The opposite of :func:`_spread`."""
    parts_NPKS = words_NQS.view(len(words_NQS), -1, 8 // bits, ROWS)
    words_NPS = parts_NPKS[:, :, 0]
    for index in range(1, 8 // bits):
        words_NPS = words_NPS | (parts_NPKS[:, :, index] << index * bits)
    return words_NPS.reshape(len(words_NQS), -1)
