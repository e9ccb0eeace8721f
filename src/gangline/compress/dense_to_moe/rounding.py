"""Round the factors of a low-rank correction to int4 with one scale per rank, as the stored form does.

Shapes: R rank, X the other side of a factor; either may come first, `dim` says which one is X.
"""

import torch
from torch import Tensor

LEVELS = 7  # codes are -7 .. 7
# A scale is the row's peak over one of these: above 7 the peak is clipped, below 7 it is met by a lower code.
_PEAK_LEVELS = (7.0, 6.0, 5.0, 4.0, 7 / 0.9, 7 / 0.8, 7 / 0.7, 7 / 0.6, 7 / 0.5)


def best_scale(factor: Tensor, dim: int = -1) -> Tensor:
    """Scale of least squared error for every rank, exact in float16; size 1 along `dim`."""
    peak = factor.abs().amax(dim, keepdim=True).clamp_min(1e-6)
    least, best = torch.full_like(peak, float("inf")), peak
    for level in _PEAK_LEVELS:
        scale = (peak / level).half().float()
        error = (rounded(factor, scale) - factor).square().sum(dim, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def codes(factor: Tensor, scale: Tensor) -> Tensor:
    """Nearest codes, floating."""
    return (factor / scale).round().clamp(-LEVELS, LEVELS)


def rounded(factor: Tensor, scale: Tensor) -> Tensor:
    """What storing makes of `factor`."""
    return codes(factor, scale) * scale
