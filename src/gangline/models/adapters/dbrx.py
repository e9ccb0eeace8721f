"""dbrx: one flat parameter per matrix, and a block that does the top-k itself.

Shape suffixes: T tokens, K chosen experts per token, D hidden, E experts, F intermediate.
"""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from gangline.core.layout import ModuleField
from gangline.kernels.reference import ExpertMath
from gangline.models.adapters.parameters import matrix_shape
from gangline.models.adapters.stacked import StackedAdapter, gated
from gangline.models.view import ExpertsForward, LayoutFlags, MoEBlock, Routed


class DbrxAdapter(StackedAdapter):
    """Parameters are ``(E * F, D)``; the last one is used as it lies: it is ``down`` stored (in, out)."""

    name = "dbrx"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is dbrx's experts module."""
        return type(module).__name__ == "DbrxExperts"

    def fields(self, module: nn.Module, flags: LayoutFlags) -> tuple[ModuleField, ...]:
        """Name ``w1``, ``v1``, ``w2`` by what they do."""
        rows, hidden = matrix_shape(module, "mlp.w1", stacked=False)
        shape = (rows // self.experts_of(module), hidden)
        return (
            ModuleField("gate", "mlp.w1", shape),
            ModuleField("up", "mlp.v1", shape),
            ModuleField("down", "mlp.w2", shape, transposed=True),
        )

    def slices(self, block: MoEBlock, stack: Tensor) -> Tensor:
        """View the flat parameter as ``(E, F, D)``."""
        return stack.view(block.geometry.experts, -1, stack.shape[-1])

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """The stock module takes and returns tokens in batches."""

        def call(hidden_states: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            return forward(x_TD, ids_TK, weights_TK).to(x_TD.dtype).view_as(hidden_states)

        return call

    def math(self, block: MoEBlock) -> ExpertMath:
        """Plain gated activation."""
        return ExpertMath(gated(cast(nn.Module, cast(Any, block.experts.mlp).activation_fn)))

    def compute(self, block: MoEBlock, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Call the class's own forward, which keeps a batch axis."""
        return super().compute(block, x_TD, ids_TK, weights_TK).reshape_as(x_TD)

    def route(self, block: MoEBlock, x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Router and block share the work."""
        logits_TE = cast(nn.Module, block.router)(x_TD)
        weights_TK, ids_TK = cast(Any, block.parent).route_tokens_to_experts(logits_TE)
        return Routed(logits_TE, weights_TK, ids_TK)
