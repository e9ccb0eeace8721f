"""How the kept values of a sparse matrix are written: plain 16-bit numbers, or integer codes with scales.

``bf16``, ``fp16``: as they are. ``int{8,4}g{32,64,128}``: ``scale * (code - 2^(bits-1))`` with one fp16 scale
for every so many *kept* values of a compressed row, that is for twice as many columns; the last group of a
row may be shorter. Codes and scales are found as in ``grouped.py``.

Shapes: R compressed rows, H kept values of a row, G groups of a row, N groups in all, L values of a group.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.core.errors import FormatError
from gangline.formats.clip import search_scale
from gangline.formats.dense import DENSE_NAMES

PLAIN = {name: dtype for dtype, name in DENSE_NAMES.items() if dtype.itemsize == 2}
WIDTHS = (8, 4)
GROUPS = (32, 64, 128)
_CODES = re.compile(r"int([48])g(32|64|128)")


@dataclass(frozen=True)
class ValueKind:
    """How one kept value is stored.

    Attributes:
        name: ``bf16``, ``fp16`` or ``int4g32`` and the like.
        width: bits of a value.
        group: values that share a scale; 0 without scales.
    """

    name: str
    width: int
    group: int

    @classmethod
    def parse(cls, name: str) -> "ValueKind":
        """The kind called ``name``; FormatError lists the known ones."""
        found = _CODES.fullmatch(name)
        if found is not None:
            return cls(name, int(found[1]), int(found[2]))
        if name in PLAIN:
            return cls(name, 16, 0)
        known = [*PLAIN, *(f"int{width}g{group}" for width in WIDTHS for group in GROUPS)]
        raise FormatError(f"unknown kind of sparse values {name!r}; known: {', '.join(known)}")

    @property
    def bits(self) -> float:
        """Bits of a value and its share of the scale."""
        return self.width + (16 / self.group if self.group else 0)

    @property
    def dtype(self) -> torch.dtype:
        """How :func:`quantize` delivers values: the 16-bit dtype, or uint8 for codes."""
        return torch.uint8 if self.group else PLAIN[self.name]

    @property
    def zero(self) -> int:
        """The code of zero; 0 for plain numbers."""
        return 2 ** (self.width - 1) if self.group else 0

    def groups(self, values: int) -> int:
        """Scales of a row of ``values``."""
        return -(-values // self.group) if self.group else 0

    def quantize(self, values_RH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values or codes ``(R, H)``, and scales ``(R, G)`` fp16 or None.

        Raises:
            FormatError: codes cannot hold nan, infinities, or values too large for an fp16 scale.
        """
        if not self.group:
            return values_RH.to(self.dtype), None
        rows, width = values_RH.shape
        w_NL = pad(values_RH.to(torch.float32), (0, -width % self.group)).reshape(-1, self.group)
        scale_N = search_scale(w_NL, self.width)
        q_NL = (w_NL / scale_N[:, None]).round_().clamp_(-self.zero, self.zero - 1).add_(self.zero)
        codes_RH = q_NL.to(torch.uint8).view(rows, -1)[:, :width]
        return codes_RH, scale_N.to(torch.float16).view(rows, -1)

    def dequantize(self, values_RH: Tensor, scales_RG: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Weights ``(R, H)``: codes are computed in fp32 and rounded once to ``dtype``."""
        if scales_RG is None:
            return values_RH.to(dtype)
        scales_RH = scales_RG.to(torch.float32).repeat_interleave(self.group, dim=1)[:, : values_RH.shape[1]]
        return (values_RH.to(torch.float32) - self.zero).mul_(scales_RH).to(dtype)
