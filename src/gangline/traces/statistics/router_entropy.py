"""How sure a router is of its choice; needs the routers' logits.

Not comparable between families whose scores are a softmax and those whose scores are sigmoids.

Shape suffixes: R rows, N experts.
"""

from dataclasses import dataclass

import numpy as np

from gangline.traces.rows import Array
from gangline.traces.statistics.spread import entropy


@dataclass(frozen=True)
class RouterEntropy:
    """Means over tokens.

    Attributes:
        entropy: of the scores (normalised to 1), divided by ``log N``; a uniform router has 1.
        first: the largest score. kept: the sum of the chosen experts' scores.
        first_uniform, kept_uniform: what a uniform router has.
    """

    entropy: float
    first: float
    kept: float
    first_uniform: float
    kept_uniform: float


def router_entropy(scores_RN: Array, used_RN: Array) -> RouterEntropy:
    """Average what the scores of all experts say.

    Args:
        scores_RN: after softmax or sigmoid; each row is divided by its sum.
        used_RN: the experts that were chosen.
    """
    p_RN = scores_RN / np.maximum(scores_RN.sum(axis=1, keepdims=True), 1e-20)
    experts = p_RN.shape[1]
    return RouterEntropy(
        entropy=float(entropy(p_RN).mean() / np.log(experts)) if experts > 1 else 1.0,
        first=float(p_RN.max(axis=1).mean()),
        kept=float((p_RN * used_RN).sum(axis=1).mean()),
        first_uniform=1 / experts,
        kept_uniform=float(used_RN.sum(axis=1).mean() / experts),
    )
