"""The order of an expert's intermediate channels: free, and worth something to the pattern.

Channel f is row f of gate and up and column f of down; permuting all three together changes nothing that the
expert computes. Where strong and weak channels alternate, a pair of rows of which one is dropped, and a group
of four columns of which two are, lose weak ones.

Shapes: F channels, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gangline.formats.samoyeds_pattern import SparsePattern, keep_mask


def best_order(
    ups_FD: Sequence[Tensor], down_DF: Tensor, pattern: SparsePattern
) -> tuple[Tensor, float, float]:
    """An order of the channels that keeps at least as much as the given one.

    Tried are the given order and the one that deals channels out by strength: the strongest, the strongest of
    the weak half, the next strongest, ... The better one is returned.

    Args:
        ups_FD: squared saliencies of the matrices with channels as rows (gate and up).
        down_DF: squared saliencies of down.
        pattern: of all of them.

    Returns:
        The order (int64, ``[F]``), and the kept share of the saliencies before and after.
    """
    given_F = torch.arange(down_DF.shape[1])
    strength_F = down_DF.sum(dim=0) / down_DF.sum().clamp(min=1e-30)
    for up_FD in ups_FD:
        strength_F = strength_F + up_FD.sum(dim=1) / up_FD.sum().clamp(min=1e-30)
    ranked_F = strength_F.argsort(descending=True, stable=True)
    half = (len(ranked_F) + 1) // 2
    dealt_F = torch.empty_like(ranked_F)
    dealt_F[::2], dealt_F[1::2] = ranked_F[:half], ranked_F[half:]
    before, after = (_kept(ups_FD, down_DF, order_F, pattern) for order_F in (given_F, dealt_F))
    return (dealt_F, before, after) if after > before else (given_F, before, before)


def _kept(ups_FD: Sequence[Tensor], down_DF: Tensor, order_F: Tensor, pattern: SparsePattern) -> float:
    """Mean over the matrices of the share of saliency that the best mask keeps."""
    shares = []
    for score in (*(up_FD[order_F] for up_FD in ups_FD), down_DF[:, order_F]):
        kept = (score * keep_mask(score, pattern)).sum()
        shares.append(float(kept / score.sum().clamp(min=1e-30)))
    return sum(shares) / len(shares)
