"""longcat_flash: some experts are the identity and have no weights.

Shape suffixes: T tokens, K chosen experts per token, D hidden, E experts with weights.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from gangline.kernels.reference import ExpertMath
from gangline.models.adapters.stacked import StackedAdapter, gated
from gangline.models.view import ExpertsForward, MoEBlock


class LongcatAdapter(StackedAdapter):
    """Ids from E on are identity experts: their weights scale the token itself; nothing is fetched for them.

    The module's ``gate_up_proj`` has rows for the identity experts too, which it never reads; ``restore``
    leaves them zero.
    """

    name = "longcat_flash"

    def claims(self, module: nn.Module) -> bool:
        """Whether this is longcat's experts module."""
        return type(module).__name__ == "LongcatFlashExperts"

    def experts_of(self, module: nn.Module) -> int:
        """Experts with weights; the identity experts are not counted."""
        return int(cast(int, module.num_routed_experts))

    def wrap(self, block: MoEBlock, forward: ExpertsForward) -> Callable[..., Tensor]:
        """Add the identity experts' share to what ``forward`` computes for the real ones."""
        experts = block.geometry.experts

        def call(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            identity_TK = torch.where(ids_TK >= experts, weights_TK, 0)
            real_TK = torch.where(ids_TK >= experts, 0, weights_TK)
            kept_T1 = identity_TK.sum(dim=-1, keepdim=True).to(x_TD.dtype)
            return forward(x_TD, ids_TK.clamp(max=experts), real_TK).to(x_TD.dtype) + x_TD * kept_T1

        return call

    def math(self, block: MoEBlock) -> ExpertMath:
        """Plain gated activation."""
        return ExpertMath(gated(cast(nn.Module, block.experts.act_fn)))
