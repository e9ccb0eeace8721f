"""Symmetric integer codes with one fp16 scale per group of columns.

``w_hat = scale * (code - 2^(b-1))`` with codes in ``[0, 2^b)``; round to nearest even with a clip search
(``clip.py``).

Layout: the codes of all rows (``bitstream.py``: rows of 32-bit words), then the scales
``(out, ceil(in/group))`` as fp16. Both parts are those of compressed-tensors ``weight_packed`` and
``weight_scale``, end to end without padding; the codes are a multiple of 4 bytes, so the scales are aligned
whenever the matrix is. Where ``in`` is not a multiple of the group, the last group of a row is smaller.

Shapes: O rows, I columns, G groups of a row, N groups in all, L weights of a group, B bytes of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.core.errors import FormatError
from gangline.formats.bitstream import pack, row_bytes, unpack
from gangline.formats.clip import search_scale
from gangline.formats.codec import CHUNK, Shape, check_raw, check_rows, check_shape, check_weight, view_as

WIDTHS = (2, 3, 4, 6, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class GroupedCodec:
    """``int{width}g{group}``."""

    width: int
    group: int

    @property
    def name(self) -> str:
        """For example ``int4g32``."""
        return f"int{self.width}g{self.group}"

    @property
    def bits(self) -> float:
        """Code and its share of the fp16 scale."""
        return self.width + 16 / self.group

    def nbytes(self, shape: Shape) -> int:
        """Bytes of codes and scales."""
        rows, columns = check_shape(self.name, shape)
        return rows * (row_bytes(columns, self.width) + 2 * self._groups(columns))

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See ``Codec.decode``; computed in fp32, rounded once to ``dtype``."""
        codes_OB, scales_OG = self.parts(raw, shape)
        out_OI = torch.empty(shape, dtype=dtype, device=raw.device)
        rows = max(1, CHUNK // shape[1])
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            q_OI = unpack(codes_OB[part], shape[1], self.width).to(torch.float32).sub_(2 ** (self.width - 1))
            self._scale(q_OI, scales_OG[part].to(torch.float32), out_OI[part])
        return out_OI

    def encode(self, weight: Tensor) -> Tensor:
        """See ``Codec.encode``; FormatError if a weight is nan, infinite or too large for an fp16 scale."""
        shape = check_weight(self.name, weight)
        raw = torch.empty(self.nbytes(shape), dtype=torch.uint8, device=weight.device)
        codes_OB, scales_OG = self.parts(raw, shape)
        rows = max(1, CHUNK // shape[1])
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            codes_OI, scales_OG[part] = self._quantize(weight[part].detach().to(torch.float32))
            codes_OB[part] = pack(codes_OI, self.width)
        return raw

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """See ``Codec.slice_rows``; a copy, because codes and scales lie apart."""
        check_rows(self.name, shape, start, stop)
        codes_OB, scales_OG = self.parts(raw, shape)
        scales = scales_OG[start:stop].reshape(-1).view(torch.uint8)
        return torch.cat([codes_OB[start:stop].reshape(-1), scales])

    def parts(self, raw: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Packed codes ``(out, row bytes)`` uint8 and scales ``(out, groups)`` fp16; views if aligned."""
        raw = check_raw(self.name, raw, shape, self.nbytes(shape))
        ends = shape[0] * row_bytes(shape[1], self.width)
        return raw[:ends].view(shape[0], -1), view_as(raw[ends:], torch.float16).view(shape[0], -1)

    def _groups(self, columns: int) -> int:
        return -(-columns // self.group)

    def _scale(self, q_OI: Tensor, scales_OG: Tensor, out_OI: Tensor) -> None:
        rows, columns = q_OI.shape
        if columns % self.group:
            scales_OI = scales_OG.repeat_interleave(self.group, dim=1)[:, :columns]
            torch.mul(q_OI, scales_OI, out=out_OI)
            return
        grouped = (rows, -1, self.group)
        torch.mul(q_OI.view(grouped), scales_OG[:, :, None], out=out_OI.view(grouped))

    def _quantize(self, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = w_OI.shape
        groups = self._groups(columns)
        w_NL = pad(w_OI, (0, groups * self.group - columns)).reshape(-1, self.group)
        try:
            scale_N = search_scale(w_NL, self.width)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error}") from error
        low = 2 ** (self.width - 1)
        q_NL = (w_NL / scale_N[:, None]).round_().clamp_(-low, low - 1).add_(low)
        codes_OI = q_NL.to(torch.uint8).view(rows, -1)[:, :columns]
        return codes_OI, scale_N.to(torch.float16).view(rows, groups)


def grouped_codecs() -> list[GroupedCodec]:
    """Every width with every group size."""
    return [GroupedCodec(width, group) for width in WIDTHS for group in GROUPS]
