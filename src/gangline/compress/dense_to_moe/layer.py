"""One dense FFN turned into groups of neurons: the plan of a layer, how it is fitted, and what it computes.

A *group* is the set of neurons that one kind of token needs. Its W neurons are dealt out to `top_k` experts
that carry the same router row, so the stock top-k router picks exactly these experts, each with weight
1/top_k; the factor top_k is folded into their down projections.

Shapes: T tokens, D hidden, N neurons of the dense FFN, G groups, W neurons per group, R and Q ranks,
E = G * top_k experts, F = W / top_k neurons per expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.compress.dense_to_moe.refit import ridge_delta, truncate
from gangline.compress.dense_to_moe.routing import choose_neurons, spherical_kmeans


@dataclass(frozen=True)
class DenseFFN:
    """A SwiGLU FFN without biases: `down(silu(gate x) * up x)`."""

    gate_ND: Tensor
    up_ND: Tensor
    down_DN: Tensor

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Activations [T, N] that the down projection reads."""
        return torch.nn.functional.silu(x_TD @ self.gate_ND.T) * (x_TD @ self.up_ND.T)


@dataclass(frozen=True)
class LowRank:
    """A correction `left @ right`; a leading G dimension on both when every group has its own."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class LayerPlan:
    """Groups of one layer: router rows, neurons, and corrections of the down projection.

    Args:
        router_GD: one row per group.
        neurons_GW: ascending neuron ids of each group.
        shared: correction [D, Q] x [Q, N] of the whole down projection.
        own: correction per group, [G, D, R] x [G, R, W]; full rank when R = D and left is the identity.
    """

    router_GD: Tensor
    neurons_GW: Tensor
    shared: LowRank | None = None
    own: LowRank | None = None

    def down_GDW(self, down_DN: Tensor) -> Tensor:
        """Corrected down projections of all groups, before the fold of top_k."""
        if self.shared is not None:
            down_DN = down_DN + self.shared.left @ self.shared.right
        down_GDW = down_DN[:, self.neurons_GW].transpose(0, 1)
        return down_GDW if self.own is None else down_GDW + self.own.left @ self.own.right

    def route(self, x_TD: Tensor) -> Tensor:
        """Group of each token."""
        return (x_TD @ self.router_GD.T).argmax(1)

    def output(self, ffn: DenseFFN, x_TD: Tensor) -> Tensor:
        """What the experts of this layer give for `x`, summed as the model sums them."""
        h_TN, group_T, down_GDW = ffn.hidden(x_TD), self.route(x_TD), self.down_GDW(ffn.down_DN)
        y_TD = torch.zeros(len(x_TD), ffn.down_DN.shape[0])
        for group, neurons_W in enumerate(self.neurons_GW):
            rows = (group_T == group).nonzero()[:, 0]
            y_TD[rows] = (h_TN[rows][:, neurons_W] @ down_GDW[group].T).to(y_TD.dtype)
        return y_TD

    def experts(self, ffn: DenseFFN, top_k: int) -> Iterator[tuple[Tensor, DenseFFN]]:
        """Router row [D] and weights of every expert, group after group."""
        for group, down_DW in enumerate(self.down_GDW(ffn.down_DN)):
            for part in range(top_k):
                ids_F = self.neurons_GW[group, part::top_k]
                weights = DenseFFN(ffn.gate_ND[ids_F], ffn.up_ND[ids_F], down_DW[:, part::top_k] * top_k)
                yield self.router_GD[group], weights


@dataclass(frozen=True)
class FitConfig:
    """How a layer is fitted; ranks of None keep the whole correction, 0 none."""

    groups: int = 8
    group_width: int = 1152
    shared_rank: int | None = 0
    own_rank: int | None = None
    shared_ridge: float = 0.3
    own_ridge: float = 0.5
    seed: int = 0


def _low_rank(delta_DN: Tensor, gram_NN: Tensor, rank: int | None) -> LowRank:
    if rank is None or rank >= delta_DN.shape[0]:
        return LowRank(torch.eye(delta_DN.shape[0]), delta_DN)
    return LowRank(*truncate(delta_DN, gram_NN, rank))


def fit_layer(
    ffn: DenseFFN, x_TD: Tensor, target_TD: Tensor, weight_T: Tensor, config: FitConfig
) -> LayerPlan:
    """Cluster, choose neurons, refit the down projection: first for all tokens, then for every group.

    Args:
        x_TD: inputs that the FFN gets in the converted model.
        target_TD: what its output should be.
        weight_T: importance of each token's error; tokens of massive norm need a small one.
    """
    groups = config.groups
    h_TN = ffn.hidden(x_TD) * weight_T[:, None]
    energy_TN = h_TN.square() * ffn.down_DN.square().sum(0)
    router_GD = spherical_kmeans(x_TD, groups, seed=config.seed)
    group_T = (x_TD @ router_GD.T).argmax(1)
    neurons_GW = choose_neurons(energy_TN, group_T, groups, config.group_width)
    del energy_TN
    shared = None
    rest_TD = target_TD * weight_T[:, None]
    member_GN = torch.zeros(groups, h_TN.shape[1]).scatter_(1, neurons_GW, 1.0)
    h_TN *= member_GN[group_T]
    rest_TD = rest_TD - h_TN @ ffn.down_DN.T
    if config.shared_rank != 0:
        shared = _low_rank(*ridge_delta(h_TN, rest_TD, config.shared_ridge), config.shared_rank)
        rest_TD = rest_TD - (h_TN @ shared.right.T) @ shared.left.T
    if config.own_rank == 0:
        return LayerPlan(router_GD, neurons_GW, shared)
    own = []
    for group, neurons_W in enumerate(neurons_GW):
        rows = (group_T == group).nonzero()[:, 0]
        refit = ridge_delta(h_TN[rows][:, neurons_W], rest_TD[rows], config.own_ridge)
        own.append(_low_rank(*refit, config.own_rank))
    stacked = LowRank(torch.stack([one.left for one in own]), torch.stack([one.right for one in own]))
    return LayerPlan(router_GD, neurons_GW, shared, stacked)
