"""SparseGPT under the two-level pattern: prune from left to right; the columns to the right make it good.

Source: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774; its
saliency and its update are those of Optimal Brain Surgeon. Ours differ: the choice has two levels. At the
start of a segment of V columns the sub-rows are chosen by the sum over groups of their two largest
saliencies, computed on weights that the segments before have corrected already; in the sub-rows that stay,
every group of four is chosen when its turn comes. A sub-row that goes is corrected as any other weights, by
the columns right of it.

Shapes: O rows, I columns, K columns filled up to whole segments, B blocks of M rows, V columns of a segment.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.compress.sparsify.moments import Moments
from gangline.formats.samoyeds_pattern import GROUP, SparsePattern, keep_groups, keep_subrows


def prune_obs(weight_OI: Tensor, moments: Moments, pattern: SparsePattern) -> Tensor:
    """The matrix (fp32) under the pattern, what is kept corrected for what is gone."""
    rows, columns = weight_OI.shape
    fill = -columns % pattern.v
    # Columns that fill up: weight zero, unconnected, of no effect on the others.
    w_OK = pad(weight_OI.to(torch.float32), (0, fill, 0, -rows % pattern.m))
    upper_KK = pad(moments.inverse_factor_II, (0, fill, 0, fill))
    upper_KK.diagonal()[columns:] = 1.0
    for start in range(0, columns + fill, pattern.v):
        stop = start + pattern.v
        error_OV = _prune_segment(w_OK[:, start:stop], upper_KK[start:stop, start:stop], pattern)
        w_OK[:, stop:] -= error_OV @ upper_KK[start:stop, stop:]
    return w_OK[:rows, :columns]


def _prune_segment(w_OV: Tensor, upper_VV: Tensor, pattern: SparsePattern) -> Tensor:
    """Prune one segment in place; returns the errors that the segments to the right have to make good."""
    scale_V = 1 / upper_VV.diagonal()
    alive_O = _alive_rows((w_OV * scale_V).square(), pattern)
    error_OV = torch.zeros_like(w_OV)
    for first in range(0, w_OV.shape[1], GROUP):
        group = slice(first, first + GROUP)
        keep_O4 = keep_groups((w_OV[:, group] * scale_V[group]).square()) & alive_O[:, None]
        for at in range(GROUP):
            column = first + at
            gone_O = w_OV[:, column].masked_fill(keep_O4[:, at], 0)
            error_O = gone_O * scale_V[column]
            w_OV[:, column:] -= error_O[:, None] * upper_VV[column, column:]
            error_OV[:, column] = error_O
        # What rounding has left of the weights that are gone, or later errors of the group have put there.
        w_OV[:, group].masked_fill_(~keep_O4, 0)
    return error_OV


def _alive_rows(saliency_OV: Tensor, pattern: SparsePattern) -> Tensor:
    if pattern.n == pattern.m:
        return torch.ones(len(saliency_OV), dtype=torch.bool, device=saliency_OV.device)
    kept_O = saliency_OV.masked_fill(~keep_groups(saliency_OV), 0).sum(dim=1)
    return keep_subrows(kept_O.view(-1, pattern.m, 1), pattern.n).flatten()
