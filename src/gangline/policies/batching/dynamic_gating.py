"""Dynamic gating: dispatch by sorting instead of capacity-padded masks.

"Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference" (arXiv 2303.06182).
Sort the expert ids, count them, and index: no token is dropped and none is padded, where static gating
computes ``E C S`` rows for ``k S`` of work. Across devices the counts go first, then the tokens.

Shape suffixes: T tokens, K experts per token, P pairs (T * K), E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dispatch:
    """Token-expert pairs in ascending expert id.

    Attributes:
        token_P: token of each pair; within an expert in ascending order.
        choice_P: which of its token's K choices the pair is.
        count_E: pairs of each expert.
    """

    token_P: NDArray[np.intp]
    choice_P: NDArray[np.intp]
    count_E: NDArray[np.intp]

    def sizes(self, device_E: Sequence[int], devices: int) -> list[int]:
        """Return the pairs for each device: what the first all-to-all tells the others."""
        sizes = np.zeros(devices, dtype=np.intp)
        np.add.at(sizes, np.asarray(device_E), self.count_E)
        return [int(size) for size in sizes]


def dispatch(ids_TK: NDArray[np.integer], experts: int) -> Dispatch:
    """Sort the pairs of one event by expert."""
    order_P = np.argsort(ids_TK.ravel(), kind="stable")
    top_k = ids_TK.shape[1]
    return Dispatch(order_P // top_k, order_P % top_k, np.bincount(ids_TK.ravel(), minlength=experts))


def waste_factor(experts: int, capacity: float, top_k: int) -> float:
    """Return rows that static gating computes per row of real work, ``E C / k``.

    Args:
        experts: routed experts E.
        capacity: rows per expert as a share of the batch's tokens.
        top_k: experts per token k.
    """
    return experts * capacity / top_k
