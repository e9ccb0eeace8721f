"""Encode weights as ggml's Q6_K, the type that llama.cpp gives the head of a Q4_0 file.

The ``gguf`` package decodes Q6_K only. Layout as in ``formats.ggml_super.decode_q6_k``: 128 bytes of low
nibbles, 64 of upper bit pairs, 16 signed scales, ``d``; a weight is ``d s (q - 32)``.

Shapes: N super-blocks of 256 weights, S 16 groups of one, L 16 weights of a group.
"""

import torch
from torch import Tensor

BLOCK, SIZE = 256, 210
_LOW, _HIGH = -32, 31


def encode_q6_k(rows: Tensor) -> Tensor:
    """Return the bytes of ``(rows, columns)`` weights; columns are a multiple of 256.

    Round to nearest; the scale of each group of 16 is fitted by least squares once it has been rounded.
    """
    x_NSL = rows.to(torch.float32).reshape(-1, 16, 16)
    scale_NS = _fitted_scales(x_NSL)
    d_N1 = (scale_NS.abs().amax(dim=1, keepdim=True) / 127).to(torch.float16)
    step_N1 = d_N1.to(torch.float32)
    s_NS = torch.where(step_N1 > 0, scale_NS / step_N1, 0).round_().clamp_(-127, 127)
    q_NSL = _rounded(x_NSL, step_N1 * s_NS).to(torch.uint8)
    # Each half of 128 weights is four runs of 32, whose bits are interleaved.
    q_N2RL = q_NSL.view(-1, 2, 4, 32)
    nibbles = q_N2RL & 15
    low_N128 = (nibbles[:, :, :2] | nibbles[:, :, 2:] << 4).reshape(-1, 128)
    pairs = q_N2RL >> 4
    upper_N64 = (pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6).reshape(
        -1, 64
    )
    return torch.cat(
        [low_N128, upper_N64, s_NS.to(torch.int8).view(torch.uint8), d_N1.view(torch.uint8)], dim=1
    )


def _fitted_scales(x_NSL: Tensor) -> Tensor:
    """Scales with which the largest weight of a group is -32 steps, then refitted to all of the group."""
    place = x_NSL.abs().argmax(dim=2, keepdim=True)
    scale_NS = x_NSL.gather(2, place).squeeze(2) / _LOW
    q_NSL = _rounded(x_NSL, scale_NS) + _LOW
    square_NS = q_NSL.square().sum(dim=2)
    return torch.where(square_NS > 0, (q_NSL * x_NSL).sum(dim=2) / square_NS.clamp_min(1), scale_NS)


def _rounded(x_NSL: Tensor, scale_NS: Tensor) -> Tensor:
    """Codes 0 to 63."""
    inverse_NS = torch.where(scale_NS != 0, 1 / scale_NS, 0)
    return (x_NSL * inverse_NS[..., None]).round_().clamp_(_LOW, _HIGH).sub_(_LOW)
