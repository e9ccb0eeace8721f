"""Decoders of the ggml super-blocks of 256 weights, whose groups share quantized scales ("K-quants").

As in ``ggml_blocks.py`` the arithmetic and its order are ggml's own.

Shapes: N super-blocks, B bytes of one, S groups of one, L weights of a group.
"""

import torch
from torch import Tensor

from gangline.formats.bitstream import planes
from gangline.formats.ggml_blocks import bytes_of, half_at


def decode_q2_k(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """16 bytes of scale (low) and min (high), 64 of 2-bit codes, ``d``, ``dmin``: ``d s q - dmin m``."""
    nibbles_NS = blocks_NB[:, :16]
    scale_NS = half_at(blocks_NB, 80) * (nibbles_NS & 15)
    min_NS = half_at(blocks_NB, 82) * (nibbles_NS >> 4)
    q_NSL = _groups(planes(bytes_of(blocks_NB, 16, 80), 32, 2), 16)
    torch.sub(q_NSL.mul_(scale_NS[..., None]), min_NS[..., None], out=_groups_of(out_NL, 16))


def decode_q3_k(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """32 bytes of third bits, 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, ``d``: ``d (s - 32) q``."""
    low_NS = planes(bytes_of(blocks_NB, 96, 104), 8, 4)
    high_N4 = blocks_NB[:, 104:108]
    high_NS = torch.cat([(high_N4 >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale_NS = half_at(blocks_NB, 108) * (low_NS | (high_NS << 4)).to(torch.float32).sub_(32)
    third_NL = planes(bytes_of(blocks_NB, 0, 32), 32, 1)
    # The third bit set means that 4 is not taken away.
    q_NL = planes(bytes_of(blocks_NB, 32, 96), 32, 2).bitwise_or_(third_NL << 2)
    torch.mul(_groups(q_NL, 16).sub_(4), scale_NS[..., None], out=_groups_of(out_NL, 16))


def decode_q4_k(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """``d``, ``dmin``, 12 bytes of 6-bit scales and mins, 128 bytes of nibbles: ``d s q - dmin m``."""
    _scaled_minus_min(planes(bytes_of(blocks_NB, 16, 144), 32, 4), blocks_NB, out_NL)


def decode_q5_k(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """As Q4_K with 32 bytes of fifth bits before the nibbles."""
    fifth_NL = planes(bytes_of(blocks_NB, 16, 48), 32, 1)
    q_NL = planes(bytes_of(blocks_NB, 48, 176), 32, 4).bitwise_or_(fifth_NL << 4)
    _scaled_minus_min(q_NL, blocks_NB, out_NL)


def decode_q6_k(blocks_NB: Tensor, out_NL: Tensor) -> None:
    """128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, ``d``: ``d s (q - 32)``."""
    scale_NS = half_at(blocks_NB, 208) * blocks_NB[:, 192:208].view(torch.int8)
    upper_NL = planes(bytes_of(blocks_NB, 128, 192), 32, 2)
    q_NL = planes(bytes_of(blocks_NB, 0, 128), 64, 4).bitwise_or_(upper_NL << 4)
    torch.mul(_groups(q_NL, 16).sub_(32), scale_NS[..., None], out=_groups_of(out_NL, 16))


def _scaled_minus_min(q_NL: Tensor, blocks_NB: Tensor, out_NL: Tensor) -> None:
    scale_NS, min_NS = _six_bit_pairs(blocks_NB[:, 4:16])
    scale_NS = half_at(blocks_NB, 0) * scale_NS
    min_NS = half_at(blocks_NB, 2) * min_NS
    q_NSL = _groups(q_NL, 32).mul_(scale_NS[..., None])
    torch.sub(q_NSL, min_NS[..., None], out=_groups_of(out_NL, 32))


def _six_bit_pairs(packed_NB: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 mins from 12 bytes.

    The first four scales and mins are the low 6 bits of the bytes 0-3 and 4-7. The last four have their low
    nibbles in the bytes 8-11 and their upper bits on top of the bytes 0-3 and 4-7.
    """
    first, second, rest = packed_NB[:, :4], packed_NB[:, 4:8], packed_NB[:, 8:]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    mins = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales, mins


def _groups(q_NL: Tensor, size: int) -> Tensor:
    return q_NL.to(torch.float32).view(len(q_NL), -1, size)


def _groups_of(out_NL: Tensor, size: int) -> Tensor:
    return out_NL.view(len(out_NL), -1, size)
