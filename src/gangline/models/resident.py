"""Compute a block from the module's own tensors with the reference kernel: the yardstick of adapters.

Shape suffixes: T tokens, K chosen experts per token, D hidden.
"""

import torch
from torch import Tensor

from gangline.kernels.grouping import group_by_expert
from gangline.kernels.reference import ReferenceKernel
from gangline.models.access import expert_math, expert_tensors, stored_fields
from gangline.models.view import ExpertsForward, MoEBlock


def resident_forward(block: MoEBlock) -> ExpertsForward:
    """Return a forward for ``install`` that reads every expert from the module itself; copies no weights."""
    math = expert_math(block)
    dtype = expert_tensors(block, 0)[0].dtype
    kernel = ReferenceKernel(stored_fields(block, dtype), math)

    def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        grouping = group_by_expert(ids_TK, weights_TK, block.geometry.experts)
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        for index, expert in enumerate(grouping.experts):
            weights = kernel.bind(
                [t.contiguous().flatten().view(torch.uint8) for t in expert_tensors(block, expert)]
            )
            grouping.add(index, kernel(x_TD[grouping.tokens(index)].to(dtype), weights, expert), out_TD)
        return out_TD.to(x_TD.dtype)

    return forward
