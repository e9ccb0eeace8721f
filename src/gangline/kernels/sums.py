"""Weighted sums of expert outputs, in fp32 and ascending expert id, wherever the experts lie.

Shape suffixes: T tokens, P (token, expert) pairs, D hidden.
"""

from typing import Any

from torch import Tensor

from gangline.kernels.cpu import native
from gangline.kernels.grouping import Grouping


def accumulate(y_PD: Tensor, grouping: Grouping, out_TD: Tensor) -> None:
    """Add the weighted outputs of all pairs to their tokens' rows of ``out_TD`` (fp32).

    Called for runs of experts in ascending order it gives the same bits as one call for all of them.
    """
    core: Any = native()
    if core is None:
        for index in range(len(grouping.experts)):
            grouping.add(index, y_PD[grouping.starts[index] : grouping.starts[index + 1]], out_TD)
        return
    y_PD, token_P = y_PD.contiguous(), grouping.token_P.contiguous()
    weight_P1 = grouping.weight_P1.contiguous()
    core.combine(
        y_PD.data_ptr(),
        token_P.data_ptr(),
        weight_P1.data_ptr(),
        len(token_P),
        out_TD.shape[0],
        out_TD.shape[1],
        out_TD.data_ptr(),
        "f32",
        True,
    )
