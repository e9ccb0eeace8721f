"""Choose the neurons of every group and the linear router that sends a token to its group.

Shapes: T tokens, D hidden, N neurons of the dense FFN, G groups, W neurons per group.
"""

import torch
from torch import Tensor


def spherical_kmeans(x_TD: Tensor, groups: int, *, rounds: int = 12, seed: int = 0) -> Tensor:
    """Cluster tokens by direction, the mean direction taken out; returns router rows [G, D].

    The router of the stock architecture has no bias, so each centre is kept orthogonal to the mean input:
    `rows @ x` then ranks the groups by cosine to the centred input without needing one. Empty clusters are
    restarted at the tokens that are served worst.
    """
    x_TD = x_TD.float()
    mean_D = torch.nn.functional.normalize(x_TD.mean(0), dim=0)
    unit_TD = torch.nn.functional.normalize(x_TD - (x_TD @ mean_D)[:, None] * mean_D, dim=1)
    generator = torch.Generator().manual_seed(seed)
    rows_GD = unit_TD[torch.randperm(len(unit_TD), generator=generator)[:groups]].clone()
    for _ in range(rounds):
        score_T, group_T = (unit_TD @ rows_GD.T).max(1)
        sums_GD = torch.zeros_like(rows_GD).index_add_(0, group_T, unit_TD)
        empty_G = torch.bincount(group_T, minlength=groups) == 0
        if empty_G.any():
            sums_GD[empty_G] = unit_TD[score_T.topk(int(empty_G.sum()), largest=False).indices]
        rows_GD = torch.nn.functional.normalize(sums_GD, dim=1)
    return rows_GD


def choose_neurons(energy_TN: Tensor, group_T: Tensor, groups: int, width: int) -> Tensor:
    """Ascending neuron ids [G, W]: those with the most output energy over each group's tokens.

    A group that got no token takes the neurons that matter most to all tokens.
    """
    total_GN = torch.zeros(groups, energy_TN.shape[1]).index_add_(0, group_T, energy_TN)
    empty_G = torch.bincount(group_T, minlength=groups) == 0
    total_GN[empty_G] = energy_TN.sum(0)
    return total_GN.topk(width, dim=1).indices.sort(dim=1).values
