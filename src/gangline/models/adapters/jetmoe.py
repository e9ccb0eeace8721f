"""jetmoe: the block holds the matrices itself and sorts its work by expert. Its MoE attention stays dense.

Shape suffixes: T tokens, K chosen experts per token, D hidden, E experts.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gangline.core.layout import ModuleField
from gangline.kernels.reference import ExpertMath
from gangline.models.adapters.parameters import matrix_shape
from gangline.models.adapters.stacked import StackedAdapter, gated
from gangline.models.view import ExpertsForward, LayoutFlags, MoEBlock, Routed


class JetMoeAdapter(StackedAdapter):
    """The experts module is the whole block ``JetMoeMoE``: router, ``input_linear`` and ``output_linear``."""

    name = "jetmoe"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is jetmoe's MoE block."""
        return type(module).__name__ == "JetMoeMoE"

    def parent_of(self, model: nn.Module, name: str) -> tuple[str, nn.Module]:
        """The module is its own block."""
        return name, model.get_submodule(name)

    def experts_of(self, module: nn.Module) -> int:
        """Experts of the two parallel linear layers."""
        return int(cast(Any, module.input_linear).num_experts)

    def fields(self, module: nn.Module, flags: LayoutFlags) -> tuple[ModuleField, ...]:
        """Name the two parallel linear layers by what they do."""
        named = (("gate_up", "input_linear.weight"), ("down", "output_linear.weight"))
        return tuple(ModuleField(name, path, matrix_shape(module, path)) for name, path in named)

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """Return the block's forward: route, compute, add the block's bias."""
        router, bias_D = cast(nn.Module, block.router), cast(Tensor, block.experts.bias)

        def call(layer_input: Tensor) -> Tensor:
            x_TD = layer_input.reshape(-1, layer_input.shape[-1])
            routed = _routed(router(x_TD), block.geometry.top_k)
            y_TD = forward(x_TD, routed.ids_TK, routed.weights_TK).to(x_TD.dtype)
            return y_TD.view_as(layer_input) + bias_D

        return call

    def math(self, block: MoEBlock) -> ExpertMath:
        """Plain gated activation."""
        return ExpertMath(gated(cast(nn.Module, block.experts.activation)))

    def compute(self, block: MoEBlock, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the block's two parallel linear layers on rows sorted by expert."""
        module = cast(Any, block.experts)
        order = ids_TK.flatten().argsort(stable=True)
        sizes = torch.bincount(ids_TK.flatten(), minlength=block.geometry.experts).tolist()
        gate, up = module.input_linear(x_TD[order // ids_TK.shape[1]], sizes).chunk(2, dim=-1)
        y_PD = module.output_linear(module.activation(gate) * up, sizes) * weights_TK.flatten()[order, None]
        return torch.zeros_like(x_TD).index_add(0, order // ids_TK.shape[1], y_PD)

    def route(self, block: MoEBlock, x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Undo the router's sorting."""
        return _routed(cast(nn.Module, block.router)(x_TD), block.geometry.top_k)


def _routed(output: tuple[Any, ...], top_k: int) -> Routed:
    """Turn the router's sorted work list back into ids and weights per token."""
    order_P, _, weight_P, sizes, logits_TE = output
    ids_P = torch.repeat_interleave(
        torch.arange(len(sizes), device=order_P.device), torch.tensor(sizes).to(order_P)
    )
    ids_TK = torch.empty_like(order_P).scatter_(0, order_P, ids_P).view(-1, top_k)
    weights_TK = torch.empty_like(weight_P).scatter_(0, order_P, weight_P).view(-1, top_k)
    return Routed(logits_TE, weights_TK, ids_TK)
