"""Distil the corrections of a converted model end to end from the dense model it came from.

Only the low-rank corrections learn (``compress/distillation.py``), routers and neurons stay as fitted. The
student computes with the corrections as they will be stored, rounded to int4, and gradients pass the rounding
straight through (arXiv 1308.3432): what is learned survives storing.

Shapes: T tokens, D hidden, N neurons, G groups, R and Q ranks, B sequences, C tokens per sequence.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gangline.compress.dense_to_moe.layer import LayerPlan, LowRank
from gangline.compress.dense_to_moe.rounding import best_scale, rounded
from gangline.compress.distillation import DistillConfig, Said, learn, say


class RoundedFactor(nn.Module):
    """A factor that learns in full precision and is used rounded, with the scales that it began with."""

    def __init__(self, factor: Tensor, dim: int) -> None:
        super().__init__()
        self.full, self.scale = nn.Parameter(factor.clone()), best_scale(factor, dim)

    def forward(self) -> Tensor:
        """The rounded factor; its gradient goes to the full one."""
        return self.full + (rounded(self.full, self.scale) - self.full).detach()


class GroupedFFN(nn.Module):
    """The dense FFN (teacher) and its grouped form (student) in one module, sharing the frozen weights.

    The student computes all neurons and masks those outside the token's group: on small models this is faster
    to train than gathering, and gives the same numbers as the experts.
    """

    def __init__(self, mlp: Any, plan: LayerPlan) -> None:
        super().__init__()
        if plan.shared is None or plan.own is None:
            raise ValueError("only a plan with shared and own corrections can be distilled")
        self.mlp, self.plan, self.teacher = mlp.requires_grad_(False), plan, False
        groups, neurons = len(plan.neurons_GW), mlp.down_proj.in_features
        rank = plan.own.right.shape[1]
        self.member_GN = torch.zeros(groups, neurons).scatter_(1, plan.neurons_GW, 1.0)
        right_GRN = torch.zeros(groups, rank, neurons)
        right_GRN.scatter_(2, plan.neurons_GW[:, None].expand(-1, rank, -1), plan.own.right)
        self.shared_left_DQ = RoundedFactor(plan.shared.left, -2)
        self.shared_right_QN = RoundedFactor(plan.shared.right, -1)
        self.own_left_GDR, self.own_right_GRN = RoundedFactor(plan.own.left, -2), RoundedFactor(right_GRN, -1)

    def forward(self, x_BCD: Tensor) -> Tensor:
        """Output of the FFN, dense or grouped."""
        if self.teacher:
            dense_BCD: Tensor = self.mlp(x_BCD)
            return dense_BCD
        x_TD = x_BCD.flatten(0, -2)
        group_T = (x_TD.float() @ self.plan.router_GD.T).argmax(1)
        h_TN = nn.functional.silu(self.mlp.gate_proj(x_TD)) * self.mlp.up_proj(x_TD)
        h_TN = h_TN * self.member_GN.to(h_TN.dtype)[group_T]
        own_left_GDR, own_right_GRN = self.own_left_GDR(), self.own_right_GRN()
        y_TD = self.mlp.down_proj(h_TN) + (h_TN @ self.shared_right_QN().T) @ self.shared_left_DQ().T
        inner_TGR = (h_TN @ own_right_GRN.flatten(0, 1).T).unflatten(1, own_right_GRN.shape[:2])
        chosen_TG1 = nn.functional.one_hot(group_T, len(self.member_GN)).to(inner_TGR.dtype)[..., None]
        y_TD = y_TD + (inner_TGR * chosen_TG1).flatten(1) @ own_left_GDR.transpose(1, 2).flatten(0, 1)
        output_BCD: Tensor = y_TD.view_as(x_BCD)
        return output_BCD

    def learned(self) -> LayerPlan:
        """The plan with the corrections as they are now."""
        neurons_GW = self.plan.neurons_GW
        right_GRN = self.own_right_GRN().detach()
        own_right_GRW = right_GRN.gather(2, neurons_GW[:, None].expand(-1, right_GRN.shape[1], -1))
        own = LowRank(self.own_left_GDR().detach(), own_right_GRW)
        shared = LowRank(self.shared_left_DQ().detach(), self.shared_right_QN().detach())
        return LayerPlan(self.plan.router_GD, neurons_GW, shared, own)


def distill(
    model: Any,
    plans: list[LayerPlan],
    batches: Iterable[Tensor],
    config: DistillConfig,
    *,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, float, Callable[[], list[LayerPlan]]], object] = lambda step, loss, plans: None,
) -> list[LayerPlan]:
    """Train the corrections in `plans` on `batches` of token ids [B, C]; changes `model` in place.

    Args:
        model: the dense model; its FFN modules are replaced.
        on_step: called with the step, its loss in nats per token, a function that gives the present plans.

    Returns:
        The learned plans.
    """
    model.requires_grad_(False)
    for layer, plan in zip(model.model.layers, plans, strict=True):
        layer.mlp = GroupedFFN(layer.mlp, plan)
    modules = [layer.mlp for layer in model.model.layers]
    factors = [factor for module in modules for factor in module.parameters() if factor.requires_grad]

    def learned() -> list[LayerPlan]:
        return [module.learned() for module in modules]

    def speak(ids_BC: Tensor, teacher: bool) -> Said:
        for module in modules:
            module.teacher = teacher
        return say(model, ids_BC, learning=not teacher, dtype=dtype)

    learn(factors, speak, batches, config, lambda now: on_step(now.step - 1, now.losses[-1], learned))
    return learned()
