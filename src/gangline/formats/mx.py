"""Microscaling numbers: E2M1 elements under a shared E8M0 exponent, and gpt-oss' way to store them.

Source: OCP Microscaling Formats (MX) specification, version 1.0.

``mxfp4`` lays end to end what the safetensors of gpt-oss hold for one expert: ``*_blocks``
``(out, in/32, 16)``, where byte j has element 2j in its low and element 2j+1 in its high nibble, then
``*_scales`` ``(out, in/32)``. The ggml type of the same name orders the nibbles otherwise
(``ggml_blocks.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats.codec import CHUNK, Shape, check_raw, check_rows, check_shape

BLOCK = 32
# Twice the value of every E2M1 code: exact small integers.
E2M1_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def half_power(exponent: Tensor) -> Tensor:
    """``2^(e - 128)`` as fp32 of E8M0 codes ``e`` (uint8): the factor of doubled E2M1 values."""
    e = exponent.to(torch.int32)
    # The two smallest are subnormal in fp32, hence not a plain exponent field.
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)


@dataclass(frozen=True)
class MXFP4Codec:
    """Blocks, then scales. Decode only: gpt-oss was trained in this format, so its files are the source."""

    name: str = "mxfp4"
    bits: float = 4.25

    def nbytes(self, shape: Shape) -> int:
        """Bytes of blocks and scales."""
        rows, columns = check_shape(self.name, shape, BLOCK)
        return rows * columns // BLOCK * 17

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See ``Codec.decode``; values are exact in bf16 and fp32. The scale 255 is nan."""
        codes_NB, scales_N = self.parts(raw, shape)
        pairs = self._pairs(raw.device)
        out_NL = torch.empty(len(scales_N), BLOCK, dtype=dtype, device=raw.device)
        step = CHUNK // BLOCK
        for start in range(0, len(scales_N), step):
            part = slice(start, start + step)
            index = codes_NB[part].reshape(-1).to(torch.int32)
            x_NL = pairs.index_select(0, index).view(torch.float32).view(-1, BLOCK)
            scale_N = half_power(scales_N[part]).masked_fill_(scales_N[part] == 255, float("nan"))
            torch.mul(x_NL, scale_N[:, None], out=out_NL[part])
        return out_NL.view(shape)

    def encode(self, weight: Tensor) -> Tensor:
        """Always a FormatError."""
        raise FormatError("mxfp4 can only be decoded; to encode, choose int4g32 or ggml:MXFP4")

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """See ``Codec.slice_rows``; a copy, because blocks and scales lie apart."""
        check_rows(self.name, shape, start, stop)
        codes_NB, scales_N = self.parts(raw, shape)
        row = shape[1] // BLOCK
        part = slice(start * row, stop * row)
        return torch.cat([codes_NB[part].reshape(-1), scales_N[part]])

    def parts(self, raw: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Element bytes ``(out * in / 32, 16)`` and exponents ``(out * in / 32)``, views of ``raw``."""
        raw = check_raw(self.name, raw, shape, self.nbytes(shape))
        blocks = shape[0] * shape[1] // BLOCK
        return raw[: blocks * 16].view(blocks, 16), raw[blocks * 16 :]

    @staticmethod
    def _pairs(device: torch.device) -> Tensor:
        """Both elements of each of the 256 bytes as one int64 of two fp32: one look-up for two weights."""
        values = torch.tensor(E2M1_DOUBLED, dtype=torch.float32, device=device)
        low, high = values.repeat(16), values.repeat_interleave(16)
        return torch.stack([low, high], dim=1).view(torch.int64).squeeze(1)
