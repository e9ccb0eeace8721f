"""Decoders of the ggml blocks of 32 weights, and the pieces that they share with the super-blocks.

The arithmetic and its order are those of ggml, so the fp32 results agree with it bit for bit. A decoder takes
blocks ``(N, B)`` of bytes and writes the weights into ``out_NL`` of any floating dtype, rounded once from
fp32.

Shapes: N blocks, B bytes of a block, L weights of a block.
"""

import torch
from torch import Tensor

from gangline.formats.bitstream import planes, unpack
from gangline.formats.mx import E2M1_DOUBLED, half_power


def bytes_of(blocks_NB: Tensor, start: int, stop: int) -> Tensor:
    """Some bytes of every block, contiguous, so that they can be viewed as wider integers."""
    return blocks_NB[:, start:stop].clone(memory_format=torch.contiguous_format)


def half_at(blocks_NB: Tensor, start: int) -> Tensor:
    """The fp16 number at byte ``start`` of every block, as fp32 ``(N, 1)``."""
    return bytes_of(blocks_NB, start, start + 2).view(torch.float16).to(torch.float32)


def decode_q4_0(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """``d`` fp16, 16 bytes of nibbles: ``d * (q - 8)``."""
    q_NL = planes(bytes_of(blocks_NB, 2, 18), 16, 4).to(torch.float32)
    torch.mul(q_NL.sub_(8), half_at(blocks_NB, 0), out=out_NL)


def decode_q4_1(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """``d``, ``m`` fp16, 16 bytes of nibbles: ``d * q + m``."""
    q_NL = planes(bytes_of(blocks_NB, 4, 20), 16, 4).to(torch.float32)
    torch.add(q_NL.mul_(half_at(blocks_NB, 0)), half_at(blocks_NB, 2), out=out_NL)


def decode_q5_0(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """``d`` fp16, 32 fifth bits, 16 bytes of nibbles: ``d * (q - 16)``."""
    q_NL = _five_bits(blocks_NB, 2).to(torch.float32)
    torch.mul(q_NL.sub_(16), half_at(blocks_NB, 0), out=out_NL)


def decode_q5_1(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """``d``, ``m`` fp16, 32 fifth bits, 16 bytes of nibbles: ``d * q + m``."""
    q_NL = _five_bits(blocks_NB, 4).to(torch.float32)
    torch.add(q_NL.mul_(half_at(blocks_NB, 0)), half_at(blocks_NB, 2), out=out_NL)


def decode_q8_0(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """``d`` fp16, 32 signed bytes: ``d * q``."""
    q_NL = blocks_NB[:, 2:].view(torch.int8).to(torch.float32)
    torch.mul(q_NL, half_at(blocks_NB, 0), out=out_NL)


def decode_mxfp4(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """E8M0 exponent, 16 bytes of E2M1 nibbles; the low nibbles are the first half of the block."""
    q_NL = planes(bytes_of(blocks_NB, 1, 17), 16, 4)
    # ggml keeps E2M1 as integers, hence no negative zero.
    values = torch.tensor(E2M1_DOUBLED, dtype=torch.float32, device=out_NL.device) + 0.0
    x_NL = values.index_select(0, q_NL.view(-1).to(torch.int32)).view(q_NL.shape)
    torch.mul(x_NL, half_power(blocks_NB[:, :1]), out=out_NL)


def _five_bits(blocks_NB: Tensor, start: int) -> Tensor:
    high_NL = unpack(bytes_of(blocks_NB, start, start + 4), 32, 1)
    return planes(bytes_of(blocks_NB, start + 4, start + 20), 16, 4).bitwise_or_(high_NL << 4)
