"""Microscaling numbers: E2M1 elements under a shared E8M0 exponent, and gpt-oss' way to store them.

Source: OCP Microscaling Formats (MX) specification, version 1.0.

``mxfp4`` lays end to end what the safetensors of gpt-oss hold for one expert: ``*_blocks``
``(out, in/32, 16)``, where byte j has element 2j in its low and element 2j+1 in its high nibble, then
``*_scales`` ``(out, in/32)``. The ggml type of the same name orders the nibbles otherwise
(``ggml_blocks.py``).

Shapes: O rows, I columns, N blocks, L weights of a block, B bytes of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats.clip import MARGIN, ordered_sum, penalty
from gangline.formats.codec import CHUNK, Shape, check_raw, check_rows, check_shape

BLOCK = 32
# Twice the value of every E2M1 code: exact small integers.
E2M1_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def half_power(exponent: Tensor) -> Tensor:
    """``2^(e - 128)`` as fp32 of E8M0 codes ``e`` (uint8): the factor of doubled E2M1 values."""
    e = exponent.to(torch.int32)
    # The two smallest are subnormal in fp32, hence not a plain exponent field.
    return torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)


def exponent_scale(exponent: Tensor) -> Tensor:
    """:func:`half_power`, and nan for the exponent 255."""
    return half_power(exponent).masked_fill_(exponent == 255, float("nan"))


def decode_e2m1(codes: Tensor) -> Tensor:
    """Twice the values of E2M1 codes (uint8, one each), fp32.

    A code is the top of an fp16 number but for the bias of its exponent, 1 instead of 15.
    """
    wide = codes.to(torch.int16)
    half = ((wide & 7) << 9) | ((wide & 8) << 12)
    return half.view(torch.float16).to(torch.float32).mul_(2.0**15)


def encode_e2m1(w_NL: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes ``(N, L)`` and E8M0 exponents ``(N,)``, both uint8, of groups of weights.

    Of the exponent that brings the largest magnitude into [4, 8), where what is past 6 is clipped, and the
    next, which clips nothing, the one with the smaller error is taken (``clip.py`` says what errors count).
    Zero is always positive.

    Raises:
        FormatError: a weight is nan or infinite.
    """
    low_N, high_N = torch.aminmax(w_NL, dim=1)
    peak_N = torch.maximum(-low_N, high_N)
    if not bool(torch.isfinite(peak_N).all()):
        raise FormatError("the weights hold nan or infinite values; repair the checkpoint before encoding it")
    # The exponent field of fp32 has the bias 127, as E8M0 has; the largest element is in [4, 8) at 2 less.
    # At 2 the reciprocal of the scale is the largest power of two that fp32 holds.
    clipping_N = ((peak_N.view(torch.int32) >> 23) - 2).clamp_(min=2)
    w_LN = w_NL.t().contiguous()
    wider = _error(w_LN, clipping_N + 1, 2.0) < _error(w_LN, clipping_N, 1.0) * MARGIN
    exponent_N = clipping_N + wider.to(torch.int32)
    return _nearest_e2m1(w_NL, exponent_N[:, None]), exponent_N.to(torch.uint8)


def _doubled(w: Tensor, exponent: Tensor) -> Tensor:
    """``w / 2^(exponent - 128)``, exact."""
    return w * ((255 - exponent) << 23).view(torch.float32)


def _error(w_LN: Tensor, exponent_N: Tensor, unit: float) -> Tensor:
    x_LN = _doubled(w_LN, exponent_N).abs_()
    return ordered_sum(penalty((decode_e2m1(_magnitude_code(x_LN)) - x_LN).abs_().mul_(unit)))


def _nearest_e2m1(w: Tensor, exponent: Tensor) -> Tensor:
    magnitude = _magnitude_code(_doubled(w, exponent).abs_())
    return magnitude | (((w < 0) & (magnitude > 0)).to(torch.uint8) << 3)


def _magnitude_code(doubled: Tensor) -> Tensor:
    """Code of the nearest doubled E2M1 magnitude; halfway goes to the even code."""
    code = (doubled > 0.5).to(torch.uint8)
    for even, limit in ((True, 1.5), (False, 2.5), (True, 3.5), (False, 5.0), (True, 7.0), (False, 10.0)):
        code += doubled >= limit if even else doubled > limit
    return code


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
            torch.mul(x_NL, exponent_scale(scales_N[part])[:, None], out=out_NL[part])
        return out_NL.view(shape)

    def encode(self, weight: Tensor) -> Tensor:
        """Always a FormatError."""
        raise FormatError("mxfp4 can only be decoded; to encode, choose tile16:mxfp4 or ggml:MXFP4")

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
