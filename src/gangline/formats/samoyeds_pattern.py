"""The two-level pattern ``N:M:V`` of Samoyeds: which weights may be kept, and the choice of the best ones.

Level 1: of the M sub-rows (one row, V columns) of a block of M rows and V columns, N are kept; the choice is
free in every block. Level 2: in every four neighbouring columns of a kept sub-row, two are kept (2:4).

Source: Samoyeds, arXiv 2503.10725. A sub-row is scored here by the sum over its groups of the *two largest*
saliencies, which is what level 2 keeps, not by the sum of all four.

Shapes: O rows, I columns, P rows filled up to whole blocks, K columns filled up, B blocks of M rows, S
segments of V columns, Q groups of four columns.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.core.errors import FormatError
from gangline.formats.codec import CHUNK

GROUP = 4
KEPT = 2
_FILL = 64
_PATTERN = re.compile(r"(\d{1,3}):(\d{1,3}):(\d{1,4})")


@dataclass(frozen=True)
class SparsePattern:
    """``n`` of ``m`` sub-rows of ``v`` columns, and 2:4 in what is kept. ``n == m`` is 2:4 alone.

    Attributes:
        n: sub-rows kept in a block, at most 16.
        m: rows of a block, at most 64.
        v: columns of a block, a multiple of 4. Codecs want a multiple of 16, GPU kernels one of 32.
    """

    n: int
    m: int
    v: int

    def __post_init__(self) -> None:
        if not (1 <= self.n <= self.m <= 64 and self.n <= 16 and self.v >= GROUP and self.v % GROUP == 0):
            raise FormatError(
                f"sparse pattern {self}: N:M:V needs 1 <= N <= M, N <= 16, M <= 64 and V a multiple of 4; "
                "for example 1:2:32, or 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> "SparsePattern":
        """``1:2:32``, or ``2:4`` for 2:4 alone; FormatError for anything else."""
        if text == "2:4":
            return cls(1, 1, 32)
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise FormatError(
                f"unknown sparse pattern {text!r}; write N:M:V, for example 1:2:32 (75 % zeros), "
                "3:4:32 (62.5 %) or 2:4 (50 %)"
            )
        return cls(*(int(part) for part in found.groups()))

    def __str__(self) -> str:
        """``1:2:32``."""
        return f"{self.n}:{self.m}:{self.v}"

    @property
    def sparsity(self) -> float:
        """Share of zeros: 0.75 for 1:2:V."""
        return 1 - self.n / self.m * KEPT / GROUP

    def blocks(self, rows: int) -> int:
        """Blocks of M rows that hold ``rows``."""
        return -(-rows // self.m)

    def columns(self, columns: int) -> int:
        """Columns filled up to whole segments and to a multiple of 64."""
        unit = math.lcm(self.v, _FILL)
        return -(-columns // unit) * unit


def keep_mask(score_OI: Tensor, pattern: SparsePattern) -> Tensor:
    """The best mask (bool, ``(out, in)``) of a pattern for a matrix of saliencies.

    Every block and every group is full where the matrix has room for it; ties go to the lower row and the
    lower column. Rows and columns past the end count as saliency below every other.

    Args:
        score_OI: what keeping each weight is worth, not negative; additive over weights.
        pattern: the pattern.
    """
    rows = max(1, CHUNK // (pattern.m * score_OI.shape[1])) * pattern.m
    parts = [_keep_rows(score_OI[start : start + rows], pattern) for start in range(0, len(score_OI), rows)]
    return torch.cat(parts)


def keep_groups(score_XI: Tensor) -> Tensor:
    """Level 2 alone: the two best of every four columns (bool); the last size must be a multiple of 4."""
    # The first of two wins if it is not smaller; who wins two of its three comparisons is kept. Several times
    # faster than sorting fours.
    a, b, c, d = torch.nan_to_num(score_XI, nan=torch.inf).unflatten(-1, (-1, GROUP)).unbind(-1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    kept = (_two(ab, ac, ad), _two(~ab, bc, bd), _two(~ac, ~bc, cd), _two(~ad, ~bd, ~cd))
    return torch.stack(kept, dim=-1).flatten(-2)


def _two(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """At least two of three."""
    return (x & y) | (z & (x | y))


def keep_subrows(score_BMS: Tensor, n: int) -> Tensor:
    """Level 1 alone: the ``n`` best of the second size (bool)."""
    order = score_BMS.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(score_BMS, dtype=torch.bool).scatter_(1, order, True)


def _keep_rows(score_OI: Tensor, pattern: SparsePattern) -> Tensor:
    rows, columns = score_OI.shape
    fill = (0, -columns % pattern.v, 0, -rows % pattern.m)
    score_PK = pad(score_OI.to(torch.float32), fill, value=-1.0)
    mask_PK = keep_groups(score_PK)
    if pattern.n < pattern.m:
        kept_PK = score_PK.masked_fill(~mask_PK, 0)
        kept_BMS = kept_PK.view(-1, pattern.m, score_PK.shape[1] // pattern.v, pattern.v).sum(dim=-1)
        alive_BMS = keep_subrows(kept_BMS, pattern.n)
        mask_PK &= alive_BMS.flatten(0, 1).repeat_interleave(pattern.v, dim=1)
    return mask_PK[:rows, :columns]
