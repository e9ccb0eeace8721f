"""What a token's experts in one layer say about its experts in the next.

Mutual information between an expert of a token in layer l and one of the same token in layer l + 1, each of
its pairs counted equally. Ids have no meaning across layers by themselves, so a copied id is no sign of
anything; information is. The null permutes the tokens of the later layer.

Shape suffixes: R rows, N experts of the earlier layer, M experts of the later one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.spread import Null, against, entropy


@dataclass(frozen=True)
class Transition:
    """From one layer to the next.

    Attributes:
        information: bits that one expert tells about the next layer's.
        share: ``information`` over the entropy of the next layer's experts.
        null: of ``information``.
    """

    information: float
    share: float
    null: Null


def transition(before_RN: Array, after_RM: Array, rng: Generator, draws: int = 10) -> Transition:
    """Measure the information between two layers.

    Args:
        before_RN: experts that each token used. after_RM: in the next MoE layer.
        rng: for the null.
        draws: of the null.
    """
    joint_NM = _joint(before_RN, after_RM)
    bits = _information(joint_NM)
    chance = np.array([_information(_joint(before_RN, rng.permutation(after_RM))) for _ in range(draws)])
    whole = float(entropy(joint_NM.sum(axis=0))) / np.log(2)
    return Transition(bits, bits / whole if whole else 0.0, against(bits, chance, "tokens permuted"))


def _joint(before_RN: Array, after_RM: Array) -> Array:
    """Each token weighs the same, whatever the number of its slots."""
    one = before_RN / np.maximum(before_RN.sum(axis=1, keepdims=True), 1)
    other = after_RM / np.maximum(after_RM.sum(axis=1, keepdims=True), 1)
    joint_NM = one.astype(np.float32).T @ other.astype(np.float32)
    return np.asarray(joint_NM, dtype=float) / float(joint_NM.sum())


def _information(joint_NM: Array) -> float:
    rows, columns = joint_NM.sum(axis=1), joint_NM.sum(axis=0)
    return float(entropy(rows) + entropy(columns) - entropy(joint_NM.ravel())) / float(np.log(2))
