"""ALPS-like pruning under the two-level pattern: ADMM finds the mask, conjugate gradients the weights.

Source: ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, arXiv
2406.07831. The problem: ``min tr((W - W0) H (W - W0)^T)`` with W under the pattern. W is split from a copy D
that has the pattern; a penalty ``rho`` draws them together and grows the faster the more the mask still
changes. Ours differ in the projection (two levels), in the start (the result of ``obs.py``), in a step length
of its own for every row in the conjugate gradients (rows are problems of their own), in the number of steps,
and in that a block of rows for which the mask at the start ends up better keeps that one: the error is never
above that of ``obs.py``.

Shapes: O rows, I columns.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.compress.sparsify.moments import Moments
from gangline.compress.sparsify.obs import prune_obs
from gangline.formats.samoyeds_pattern import SparsePattern, keep_mask

STEPS = 60
REFINE_STEPS = 12
_EVERY = 3
_RHO = 0.1
# Share of the kept places that changed, and the growth of rho that goes with it.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def prune_admm(weight_OI: Tensor, moments: Moments, pattern: SparsePattern, steps: int = STEPS) -> Tensor:
    """The matrix (fp32) under the pattern, what is kept corrected for what is gone."""
    # Inputs are brought to unit size, so that one penalty fits all; sizes then weigh in the projection.
    scale_I = moments.damped_II.diagonal().sqrt()
    h_II = moments.damped_II / scale_I / scale_I[:, None]
    target_OI = weight_OI.to(torch.float32) * scale_I
    values_I, vectors_II = torch.linalg.eigh(h_II)
    pull_OI = target_OI @ h_II
    start_OI = prune_obs(weight_OI, moments, pattern)
    first_OI = mask_OI = start_OI != 0
    d_OI, dual_OI, rho, seen_OI = start_OI * scale_I, torch.zeros_like(target_OI), _RHO, mask_OI
    for step in range(1, steps + 1):
        right_OI = pull_OI - dual_OI + rho * d_OI
        w_OI = (right_OI @ vectors_II / (values_I + rho)) @ vectors_II.t()
        shifted_OI = w_OI + dual_OI / rho
        mask_OI = keep_mask(shifted_OI.square(), pattern)
        d_OI = shifted_OI * mask_OI
        dual_OI += rho * (w_OI - d_OI)
        if step % _EVERY == 0:
            changed = float((mask_OI & ~seen_OI).sum() / mask_OI.sum())
            if changed == 0:
                break
            rho *= next(growth for share, growth in _GROWTH if changed >= share)
            seen_OI = mask_OI
    found_OI = refine(d_OI / scale_I, weight_OI, mask_OI, moments)
    plain_OI = refine(start_OI, weight_OI, first_OI, moments)
    return _better(found_OI, plain_OI, weight_OI, moments, pattern.m)


def _better(one_OI: Tensor, other_OI: Tensor, weight_OI: Tensor, moments: Moments, m: int) -> Tensor:
    """For every block of M rows the one with the smaller error: blocks are problems of their own."""

    def error_B(w_OI: Tensor) -> Tensor:
        gone_OI = w_OI - weight_OI
        error_O = ((gone_OI @ moments.damped_II) * gone_OI).sum(dim=1)
        return pad(error_O, (0, -len(error_O) % m)).view(-1, m).sum(dim=1)

    first_B = error_B(one_OI) <= error_B(other_OI)
    return torch.where(first_B.repeat_interleave(m)[: len(one_OI), None], one_OI, other_OI)


def refine(
    start_OI: Tensor, weight_OI: Tensor, mask_OI: Tensor, moments: Moments, steps: int = REFINE_STEPS
) -> Tensor:
    """Conjugate gradients towards the best weights under a mask, preconditioned by the diagonal.

    Args:
        start_OI: where to begin; zero outside of the mask.
        weight_OI: the weights before pruning.
        mask_OI: what is kept.
        moments: of the inputs.
        steps: at most so many.
    """
    h_II, w_OI = moments.damped_II, start_OI.clone()
    inverse_I = 1 / h_II.diagonal()
    residual_OI = ((weight_OI.to(torch.float32) - w_OI) @ h_II).masked_fill_(~mask_OI, 0)
    step_OI = residual_OI * inverse_I
    size_O1 = (residual_OI * step_OI).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image_OI = (step_OI @ h_II).masked_fill_(~mask_OI, 0)
        curve_O1 = (step_OI * image_OI).sum(dim=1, keepdim=True)
        length_O1 = torch.where(curve_O1 > 0, size_O1 / curve_O1, 0)
        w_OI += length_O1 * step_OI
        residual_OI -= length_O1 * image_OI
        scaled_OI = residual_OI * inverse_I
        next_O1 = (residual_OI * scaled_OI).sum(dim=1, keepdim=True)
        step_OI = scaled_OI + torch.where(size_O1 > 0, next_O1 / size_O1, 0) * step_OI
        size_O1 = next_O1
    return w_OI
