"""Refit down projections by least squares on the activations that a group really gets.

Shapes: T tokens, D hidden, N neurons, R rank.
"""

import torch
from torch import Tensor


def ridge_delta(h_TN: Tensor, target_TD: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """`delta [D, N]` and the gram matrix `h^T h`.

    `delta` minimises `|h delta^T - target|^2 + ridge * mean(diag(gram)) * |delta|^2`.
    `target` is what the present weights leave over, so the penalty pulls towards the present weights.
    """
    gram_NN = h_TN.T @ h_TN
    ridged_NN = gram_NN + ridge * gram_NN.diagonal().mean().clamp_min(1e-12) * torch.eye(gram_NN.shape[0])
    delta_ND = torch.cholesky_solve(h_TN.T @ target_TD, torch.linalg.cholesky(ridged_NN))
    return delta_ND.T, gram_NN


def truncate(delta_DN: Tensor, gram_NN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-R factors `left [D, R]`, `right [R, N]` of a refit, judged on outputs, not on weights.

    Reduced-rank regression: project on the leading eigenvectors of `delta gram delta^T`.
    """
    _, vectors_DD = torch.linalg.eigh(delta_DN @ gram_NN @ delta_DN.T)
    left_DR = vectors_DD[:, -rank:]
    return left_DR, left_DR.T @ delta_DN
