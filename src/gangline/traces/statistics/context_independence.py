"""Context independence: how much of the routing the token id alone explains.

``1 - within / total`` of Hamming distances between the experts of two tokens: within is the mean distance of
a token to the other tokens of the same id, total that of any two tokens. No token is compared with itself, so
random routing gives 0 in expectation and a router that looks at the id only gives 1.

Xue et al., "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models" (arXiv 2402.01739):
"context-independent specialization". The null permutes the ids over rows.

Shape suffixes: R rows, N experts, V different token ids.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import counted, numbered
from gangline.traces.statistics.spread import Null, against


@dataclass(frozen=True)
class ContextIndependence:
    """One layer.

    Attributes:
        explained: share of the routing's variance that the id explains; not below 0 except by chance.
        within: mean Hamming distance of tokens with the same id. total: of any two tokens.
        null: of ``explained``.
        rows: tokens whose id occurs more than once; the others say nothing.
    """

    explained: float
    within: float
    total: float
    null: Null
    rows: int


def context_independence(
    used_RN: Array, token_R: Array, rng: Generator, draws: int = 20
) -> ContextIndependence | None:
    """Measure one layer; None if no id occurs twice, or if every token uses the same experts.

    Args:
        used_RN: experts of each row.
        token_R: its token id.
        rng: for the null.
        draws: of the null.
    """
    number_R, ids = numbered(token_R)
    counts_V = np.bincount(number_R, minlength=ids)
    repeated = int(counts_V[counts_V > 1].sum())
    if not repeated:
        return None
    total = _distance(used_RN, np.zeros(len(used_RN), dtype=np.int64), 1)
    if not total:
        return None
    within = _distance(used_RN, number_R, ids)
    chance = np.array([1 - _distance(used_RN, rng.permutation(number_R), ids) / total for _ in range(draws)])
    value = 1 - within / total
    null = against(value, chance, "token ids permuted over the text")
    return ContextIndependence(value, within, total, null, repeated)


def _distance(used_RN: Array, number_R: Array, ids: int) -> float:
    """Mean Hamming distance of a token to the others of its id, over tokens whose id has others."""
    n_V = np.bincount(number_R, minlength=ids).astype(float)
    ones_VN = counted(used_RN, number_R, ids)
    # Ordered pairs of an id's tokens of which exactly one uses an expert.
    differ_V = 2 * (ones_VN * (n_V[:, None] - ones_VN)).sum(axis=1)
    several = n_V > 1
    return float((differ_V[several] / (n_V[several] - 1)).sum() / n_V[several].sum())
