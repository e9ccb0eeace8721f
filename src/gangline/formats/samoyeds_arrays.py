"""The canonical arrays of a matrix under a pattern ``N:M:V``: values, sub-row numbers, positions.

For compressed row ``r``, compressed column ``c`` (integer division)::

    segment  s = 2c / V        group  q = c / 2        slot  b = c % 2
    row      = (r / N) * M + sub[s][r]
    column   = 4q + ((meta[r][q] >> 2b) & 3)

``meta`` is ``i0 | i1 << 2`` with ``i0 < i1``; within a block and segment the N values of ``sub`` increase.
Both make the encoding unique. Rows and columns that only fill up have values 0.

Shapes: O rows, I columns, P rows filled up to whole blocks, K columns filled up, B blocks of M rows, R
compressed rows (B N), H compressed columns (K / 2), S segments, Q groups of four columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.core.errors import FormatError
from gangline.formats.samoyeds_pattern import GROUP, KEPT, SparsePattern, keep_groups, keep_mask, keep_subrows


@dataclass(frozen=True)
class SparseArrays:
    """What is kept of a matrix.

    Attributes:
        values_RH: the kept weights, in column order.
        sub_SR: uint8, the kept sub-row inside its block, 0 to M - 1.
        meta_RQ: uint8, the two positions inside a group.
    """

    values_RH: Tensor
    sub_SR: Tensor
    meta_RQ: Tensor


def prune_magnitude(weight_OI: Tensor, pattern: SparsePattern) -> Tensor:
    """The matrix with all but the largest weights set to zero."""
    return weight_OI.masked_fill(~keep_mask(weight_OI.abs(), pattern), 0)


def compress(weight_OI: Tensor, pattern: SparsePattern, columns: int | None = None) -> SparseArrays:
    """The arrays of a matrix that has the pattern already.

    Args:
        weight_OI: any dtype. What is kept is found by magnitude, so that a negative zero counts as zero.
        pattern: the pattern.
        columns: columns K to fill up to; by default the next multiple of V.

    Raises:
        FormatError: weights that are not zero would be lost.
    """
    rows, width = weight_OI.shape
    if columns is None:
        columns = -(-width // pattern.v) * pattern.v
    w_PK = pad(weight_OI, (0, columns - width, 0, -rows % pattern.m))
    size_PK = w_PK.abs().to(torch.float32)
    keep_PK = keep_groups(size_PK)
    w_BMSV = w_PK.view(-1, pattern.m, columns // pattern.v, pattern.v)
    kept_BMS = size_PK.masked_fill(~keep_PK, 0).view(w_BMSV.shape).amax(dim=-1)
    alive_BMS = keep_subrows(kept_BMS, pattern.n)
    keep_BMSV = keep_PK.view(w_BMSV.shape) & alive_BMS[..., None]
    if bool(((w_BMSV != 0) & ~keep_BMSV).any()):
        raise FormatError(
            f"the weights do not have the pattern {pattern}: other than zero where it keeps nothing; "
            "prune them first (gangline sparsify)"
        )
    sub_BSN = alive_BMS.transpose(1, 2).nonzero()[:, 2].view(len(w_BMSV), -1, pattern.n)
    sub_SR = sub_BSN.permute(1, 0, 2).flatten(1)
    return _gather(w_PK, keep_PK, sub_SR, pattern)


def decompress(arrays: SparseArrays, pattern: SparsePattern, shape: tuple[int, int]) -> Tensor:
    """The matrix ``(out, in)`` with its zeros, in the dtype of the values."""
    values_RH, (segments, compressed) = arrays.values_RH, arrays.sub_SR.shape
    columns = 2 * values_RH.shape[1]
    at_RH = _columns(arrays.meta_RQ)
    dense_RK = values_RH.new_zeros(compressed, columns).scatter_(1, at_RH, values_RH)
    blocks = compressed // pattern.n
    out_PSV = values_RH.new_zeros(blocks * pattern.m, segments, columns // segments)
    out_PSV[_rows(arrays.sub_SR, pattern), torch.arange(segments, device=at_RH.device)[:, None]] = (
        dense_RK.view(compressed, segments, -1).transpose(0, 1)
    )
    return out_PSV.flatten(1)[: shape[0], : shape[1]]


def check_arrays(arrays: SparseArrays, pattern: SparsePattern) -> None:
    """Refuse arrays that no matrix has; FormatError says which rule they break."""
    first, second = arrays.meta_RQ & 3, arrays.meta_RQ >> 2
    if bool((first >= second).any()) or bool((second > 3).any()):
        raise FormatError(
            "sparse metadata: the two positions of a group do not increase; the file is damaged"
        )
    sub_SBN = arrays.sub_SR.unflatten(1, (-1, pattern.n)).to(torch.int16)
    if bool((sub_SBN >= pattern.m).any()) or bool((sub_SBN.diff(dim=2) <= 0).any()):
        raise FormatError(f"sub-rows of {pattern}: out of range or not increasing; the file is damaged")


def _gather(w_PK: Tensor, keep_PK: Tensor, sub_SR: Tensor, pattern: SparsePattern) -> SparseArrays:
    rows_SR = _rows(sub_SR, pattern)
    segments_S1 = torch.arange(len(sub_SR), device=sub_SR.device)[:, None]
    shape = (len(w_PK), len(sub_SR), -1)
    w_RK = w_PK.view(shape)[rows_SR, segments_S1].transpose(0, 1).flatten(1)
    # keep_groups marks exactly two columns of every group, also where all are zero.
    keep_RK = keep_PK.view(shape)[rows_SR, segments_S1].transpose(0, 1).flatten(1)
    at_RQ2 = keep_RK.nonzero()[:, 1].view(len(w_RK), -1, KEPT) % GROUP
    values_RH = w_RK[keep_RK].view(len(w_RK), -1)
    meta_RQ = (at_RQ2[..., 0] | (at_RQ2[..., 1] << 2)).to(torch.uint8)
    return SparseArrays(values_RH, sub_SR.to(torch.uint8), meta_RQ)


def _rows(sub_SR: Tensor, pattern: SparsePattern) -> Tensor:
    block_R = torch.arange(sub_SR.shape[1], device=sub_SR.device) // pattern.n
    return block_R * pattern.m + sub_SR


def _columns(meta_RQ: Tensor) -> Tensor:
    """Column of every compressed column."""
    at_RQ2 = torch.stack([meta_RQ & 3, meta_RQ >> 2], dim=2).to(torch.int64)
    base_Q1 = torch.arange(meta_RQ.shape[1], device=meta_RQ.device)[:, None] * GROUP
    return (at_RQ2 + base_Q1).flatten(1)
