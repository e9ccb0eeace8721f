"""Experts as modules of their own, ``expert_0`` .. in an ``nn.ModuleDict``: switch_transformers and nllb_moe.

Both are encoder-decoder models with ReLU experts without a gate, whose routers speak in masks. Each adapter
turns the masks into ids and weights; a token that found its expert full gets an empty slot.

Shape suffixes: B sequences, S tokens per sequence, T tokens, K chosen experts per token, D hidden, E experts.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gangline.core.layout import ModuleField
from gangline.kernels.reference import ExpertMath
from gangline.models.adapters.parameters import get_parameter, matrix_shape, set_parameter
from gangline.models.adapters.stacked import StackedAdapter
from gangline.models.view import ExpertsForward, LayoutFlags, MoEBlock, Routed


class ModulesAdapter(StackedAdapter):
    """Reads two linear layers per expert; ``up_name`` and ``down_name`` are what the family calls them."""

    up_name: str
    down_name: str

    def fields(self, module: nn.Module, flags: LayoutFlags) -> tuple[ModuleField, ...]:
        """One field per linear layer."""
        names = (("up", self.up_name), ("down", self.down_name))
        return tuple(
            ModuleField(
                field,
                f"expert_{{expert}}.{name}.weight",
                matrix_shape(module, f"expert_0.{name}.weight", stacked=False),
            )
            for field, name in names
        )

    def flags(self, module: nn.Module) -> LayoutFlags:
        """No gate; nllb's linear layers have a bias."""
        bias = cast(Any, module)["expert_0"].get_submodule(self.up_name).bias is not None
        return {"has_gate": False, "has_bias": bias}

    def param_shapes(self, module: nn.Module, fields: tuple[ModuleField, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of one expert's parameters."""
        return {field.parameter: field.shape for field in fields}

    def expert_tensors(self, block: MoEBlock, expert: int) -> tuple[Tensor, ...]:
        """Return the weights of one expert's linear layers."""
        names = (name.format(expert=expert) for name in block.param_names)
        return tuple(get_parameter(block.experts, name).detach() for name in names)

    def drop(self, block: MoEBlock) -> None:
        """Forget the weights of every expert."""
        for expert in range(block.geometry.experts):
            for name in block.param_names:
                set_parameter(block.experts, name.format(expert=expert), None)

    def restore(self, block: MoEBlock, experts: Iterable[tuple[Tensor, ...]]) -> None:
        """Give each expert copies of its weights."""
        for expert, tensors in enumerate(experts):
            for name, tensor in zip(block.param_names, tensors, strict=True):
                set_parameter(block.experts, name.format(expert=expert), tensor.detach().clone())

    def math(self, block: MoEBlock) -> ExpertMath:
        """Activation, and nllb's biases."""
        experts = [cast(Any, block.experts)[f"expert_{i}"] for i in range(block.geometry.experts)]

        def biases(name: str) -> Tensor:
            return torch.stack([expert.get_submodule(name).bias.detach() for expert in experts])

        if not block.has_bias:
            return ExpertMath(experts[0].act)
        return ExpertMath(
            experts[0].act, gate_up_bias_EG=biases(self.up_name), down_bias_ED=biases(self.down_name)
        )

    def compute(self, block: MoEBlock, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the expert modules themselves."""
        y_TD = torch.zeros_like(x_TD)
        for expert in ids_TK.unique().tolist():
            weight_T1 = torch.where(ids_TK == expert, weights_TK, 0).sum(dim=-1, keepdim=True)
            y_TD += cast(Any, block.experts)[f"expert_{expert}"](x_TD) * weight_T1
        return y_TD


class SwitchAdapter(ModulesAdapter):
    """switch_transformers: one expert per token, ``expert_capacity`` tokens per expert and sequence."""

    name = "switch_transformers"
    up_name, down_name = "wi", "wo"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is switch's expert dictionary."""
        return type(module).__name__ == "SwitchTransformersExperts"

    def top_k(self, router: nn.Module | None, parent: nn.Module) -> int:
        """Always one."""
        return 1

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """Read the expert off the dispatch mask."""

        def call(x_TD: Tensor, mask_T1E: Tensor, weights_T1: Tensor) -> Tensor:
            ids_T1 = _ids(mask_T1E.flatten(0, 1))
            return forward(x_TD, ids_T1, weights_T1).to(x_TD.dtype)

        return call

    def route(self, block: MoEBlock, x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Rows form one sequence, so that capacity counts over all of them."""
        mask_BSE, weights_BS1, logits_BSE = cast(nn.Module, block.router)(x_TD.unsqueeze(0))
        ids_T1 = _ids(mask_BSE[0])
        weights_T1 = torch.where(ids_T1 < mask_BSE.shape[-1], weights_BS1[0], 0)
        return Routed(logits_BSE[0], weights_T1, ids_T1)


class NllbAdapter(ModulesAdapter):
    """nllb_moe: two experts per token; an evaluation-time factor stands for token dropout.

    transformers 5.23 reads the router's one-hot mask of the first expert as if its entries were expert ids:
    only ``expert_0`` and ``expert_1`` ever run. The adapter gives the plain model's result, whichever
    reading the installed version has, and says so in the block's notes.
    """

    name = "nllb_moe"
    up_name, down_name = "fc1", "fc2"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is nllb's expert dictionary."""
        return type(module).__name__ == "NllbMoeExperts"

    def top_k(self, router: nn.Module | None, parent: nn.Module) -> int:
        """Always two."""
        return 2

    def describe(self, model: nn.Module, name: str, module: nn.Module, layer: int) -> MoEBlock:
        """Build the block, and note what the installed transformers does with its experts."""
        block = super().describe(model, name, module, layer)
        if _mask_read_as_ids(cast(Any, type(block.parent)), cast(Any, model).config_class):
            block.notes = (
                "this transformers version runs only experts 0 and 1 of nllb_moe, whatever the router "
                "chooses; gangline reproduces that",
            )
        return block

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """Turn the router's mask and probabilities into ids and weights."""
        as_ids = bool(block.notes)
        factor = 1.0 - float(cast(Any, block.experts).moe_token_dropout)

        def call(x_TD: Tensor, mask_TE: Tensor, weights_TE: Tensor) -> Tensor:
            ids_TK, weights_TK = _by_mask_value(mask_TE, weights_TE) if as_ids else _two_best(weights_TE)
            return forward(x_TD, ids_TK, weights_TK * factor).to(x_TD.dtype)

        return call

    def route(self, block: MoEBlock, x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Return what the router chose, not what the stock experts make of it."""
        _, weights_TE, logits_TE = cast(nn.Module, block.router)(x_TD)
        ids_TK, weights_TK = _two_best(weights_TE)
        return Routed(logits_TE, weights_TK, ids_TK)


def _ids(mask_TE: Tensor) -> Tensor:
    """Return ``[T, 1]``: the marked expert, or E where none is."""
    return torch.where(mask_TE.any(dim=-1), mask_TE.argmax(dim=-1), mask_TE.shape[-1]).unsqueeze(-1)


def _two_best(weights_TE: Tensor) -> tuple[Tensor, Tensor]:
    weights_TK, ids_TK = weights_TE.topk(2, dim=-1)
    return torch.where(weights_TK == 0, weights_TE.shape[-1], ids_TK), weights_TK


def _by_mask_value(mask_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Expert 0 gets the weights of the unmarked entries, expert 1 that of the marked one."""
    marked_T = (weights_TE * mask_TE).sum(dim=-1)
    unmarked_T = (weights_TE * (1 - mask_TE)).sum(dim=-1)
    ids_TK = torch.tensor([0, 1], device=mask_TE.device).expand(len(mask_TE), 2)
    return ids_TK, torch.stack((unmarked_T, marked_T), dim=-1)


@cache
def _mask_read_as_ids(block_class: Callable[..., Any], config_class: Callable[..., Any]) -> bool:
    """Run a block of three experts that each return their own id, and see whether expert 2 is ever heard."""
    config = config_class(d_model=1, num_experts=3, moe_token_dropout=0.0, activation_function="relu")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        block = block_class(config, 1).float().eval()
        for i in range(3):
            expert = block.experts[f"expert_{i}"]
            for parameter in expert.parameters():
                parameter.zero_()
            expert.fc2.bias.fill_(float(i))
        chosen_TE = one_hot(torch.tensor([2, 2]), 3)
        heard_TD = block.experts(torch.ones(2, 1), chosen_TE, chosen_TE.float())
    return not bool((heard_TD == 2).all())
