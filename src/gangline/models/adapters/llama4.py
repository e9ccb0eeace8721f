"""llama4: the score scales the expert's input, and the stock block runs every expert on every token.

Shape suffixes: T tokens, K chosen experts per token, P = T * K, D hidden, E experts.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from gangline.kernels.reference import ExpertMath
from gangline.models.adapters.stacked import StackedAdapter, gated, replace_forward
from gangline.models.view import ExpertsForward, LayoutFlags, MoEBlock, Routed, Undo


class Llama4Adapter(StackedAdapter):
    """Replaces the block's forward. Unchosen experts see zeros and give zero: leaving them out is exact.

    ``forward`` gets one row per (token, slot), scaled by its score, with one id and weight 1.
    """

    name = "llama4"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is llama4's experts module."""
        return type(module).__name__ == "Llama4TextExperts"

    def flags(self, module: nn.Module) -> LayoutFlags:
        """Weights are stored (in, out)."""
        return {"transposed": True}

    def install(self, block: MoEBlock, forward: ExpertsForward) -> Undo:
        """Shadow the whole block's forward, because the stock one multiplies tokens by experts."""
        return replace_forward(block.parent, self.wrap(block, forward))

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """Return the block's forward: shared expert plus the chosen experts on scaled inputs."""
        router, shared = cast(nn.Module, block.router), cast(nn.Module, block.parent.shared_expert)

        def call(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            routed = self._routed(block, *router(x_TD))
            # One row per (token, slot): the expert sees its token already scaled.
            rows_TKD = x_TD.unsqueeze(1) * routed.weights_TK.unsqueeze(-1)
            ids_P1 = routed.ids_TK.reshape(-1, 1)
            y_PD = forward(rows_TKD.flatten(0, 1), ids_P1, torch.ones_like(ids_P1, dtype=x_TD.dtype))
            return shared(x_TD) + y_PD.to(x_TD.dtype).view_as(rows_TKD).sum(dim=1), routed.logits_TE

        return call  # type: ignore[return-value]

    def math(self, block: MoEBlock) -> ExpertMath:
        """Plain gated activation."""
        return ExpertMath(gated(cast(nn.Module, block.experts.act_fn)))

    def compute(self, block: MoEBlock, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the stock batched product on a copy of the module that holds the chosen experts only."""
        chosen, place_TK = ids_TK.unique(return_inverse=True)
        few = copy.copy(block.experts)
        few._parameters = {n: nn.Parameter(cast(Tensor, p)[chosen]) for n, p in few._parameters.items()}
        every = few(x_TD.repeat(len(chosen), 1)).view(len(chosen), *x_TD.shape)
        rows_T1 = torch.arange(len(x_TD), device=x_TD.device).unsqueeze(-1)
        return cast(Tensor, (every[place_TK, rows_T1] * weights_TK.unsqueeze(-1)).sum(dim=1))

    def route(self, block: MoEBlock, x_TD: Tensor, token_ids_T: Tensor) -> Routed:
        """Turn the router's dense scores into ids and weights."""
        return self._routed(block, *cast(nn.Module, block.router)(x_TD))

    def _routed(self, block: MoEBlock, scores_TE: Tensor, logits_TE: Tensor) -> Routed:
        ids_TK = logits_TE.topk(block.geometry.top_k, dim=1).indices
        return Routed(logits_TE, scores_TE.gather(1, ids_TK), ids_TK)
