"""Second moments of a matrix's inputs, and what pruning and correcting need of them.

Shapes: N tokens, I inputs (columns), O outputs (rows).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """``H = sum_n weight_n x_n x_n^T / sum_n weight_n`` of the inputs of one matrix, in fp32.

    Attributes:
        h_II: without damping.
        damping: share of the mean of the diagonal that :attr:`damped_II` adds.
    """

    h_II: Tensor
    damping: float

    @classmethod
    def of(cls, x_NI: Tensor, weight_N: Tensor, damping: float) -> "Moments":
        """Moments of inputs; the weights (not negative) need not sum to one."""
        total = float(weight_N.sum())
        share_N = weight_N / total if total > 0 else torch.full_like(weight_N, 1 / max(1, len(weight_N)))
        x_NI = x_NI.to(torch.float32) * share_N.to(torch.float32).sqrt()[:, None]
        return cls(x_NI.t() @ x_NI, damping)

    @property
    def norm_I(self) -> Tensor:
        """Root mean square of every input."""
        return self.h_II.diagonal().clamp(min=0).sqrt()

    @cached_property
    def damped_II(self) -> Tensor:
        """H with damping: positive definite."""
        diagonal = self.h_II.diagonal()
        extra = max(self.damping * float(diagonal.mean()), 1e-12)
        return self.h_II + extra * torch.eye(len(diagonal), device=diagonal.device)

    @cached_property
    def inverse_factor_II(self) -> Tensor:
        """The upper triangular U with ``U^T U = damped^-1``.

        ``1 / U_ii^2`` is what input i is worth once the inputs before it are fixed.
        """
        damped_II = self.damped_II
        for _ in range(8):
            lower_II, failed = torch.linalg.cholesky_ex(damped_II)
            if not int(failed):
                inverse_II = torch.cholesky_inverse(lower_II)
                upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
                if not int(failed):
                    assert isinstance(upper_II, Tensor)
                    return upper_II
            # Rounding has eaten the damping; ten times as much only makes the correction more cautious.
            diagonal = damped_II.diagonal()
            damped_II = damped_II + 10 * self.damping * diagonal.mean() * torch.eye(len(diagonal))
        return (1 / self.damped_II.diagonal().sqrt()).diag()

    def error(self, difference_OI: Tensor) -> float:
        """``tr(D H D^T)``: the weighted mean square of what the outputs change by."""
        return float(((difference_OI @ self.h_II) * difference_OI).sum())
