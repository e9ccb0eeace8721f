"""Early learning: how soon in training the routing is what it will be.

Router saturation is the share of a token's experts at an earlier checkpoint that it also uses at the last
one, on the same text and positions; ``K/N`` by chance. Muennighoff et al., "OLMoE" (arXiv 2409.02060). Churn
is the share of token ids whose most frequent first choice differs: OpenMoE's finding is that the map from
tokens to experts is settled before the first stored checkpoint (arXiv 2402.01739).

Shape suffixes: R rows, N experts, V different token ids.
"""

from dataclasses import dataclass

import numpy as np

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import counted, numbered


@dataclass(frozen=True)
class Saturation:
    """An earlier checkpoint beside the last one, in one layer.

    Attributes:
        saturation: mean share of common experts. chance: ``K/N``.
        churn: share of token ids whose most frequent first choice differs.
    """

    saturation: float
    chance: float
    churn: float


def saturation(
    earlier_RN: Array, last_RN: Array, first_earlier_R: Array, first_last_R: Array, token_R: Array
) -> Saturation:
    """Compare two checkpoints on the same rows.

    Args:
        earlier_RN, last_RN: experts of each token at both checkpoints.
        first_earlier_R, first_last_R: its first choices.
        token_R: its id.
    """
    slots_R = np.maximum(last_RN.sum(axis=1), 1)
    number_R, ids = numbered(token_R)
    experts = last_RN.shape[1]
    maps = [
        counted(first_R[:, None] == np.arange(experts), number_R, ids).argmax(axis=1)
        for first_R in (first_earlier_R, first_last_R)
    ]
    return Saturation(
        saturation=float(((earlier_RN & last_RN).sum(axis=1) / slots_R).mean()),
        chance=float(slots_R.mean() / experts),
        churn=float((maps[0] != maps[1]).mean()),
    )
