"""Whether experts belong to tokens: vocabulary specialisation, and the tokens of each expert.

For each token id with at least ``least`` occurrences the largest ``P(expert in top-k | token)``, averaged
over ids; for the token that enters, the one the model predicts, and the one that follows. The null permutes
the ids over rows, which keeps how often each occurs. High values in early layers are normal.

Muennighoff et al., "OLMoE: Open Mixture-of-Experts Language Models" (arXiv 2409.02060).

Shape suffixes: R rows, N experts, V different token ids.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import counted, numbered
from gangline.traces.statistics.spread import Null, against

LEAST = 8
"""Occurrences below which a token id is left out."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids and experts of one layer.

    Attributes:
        specialisation: mean over ids of the largest share.
        null: of it.
        ids: how many ids occur often enough.
    """

    specialisation: float
    null: Null
    ids: int


@dataclass(frozen=True)
class TopToken:
    """A token of an expert: its id, how often it used the expert, and how much more often than tokens do."""

    token: int
    count: int
    lift: float


def vocabulary(
    used_RN: Array, token_R: Array, rng: Generator, least: int = LEAST, draws: int = 20
) -> Vocabulary | None:
    """Measure one layer; None if no id occurs often enough.

    Args:
        used_RN: experts of each row.
        token_R: its token id; rows below 0 (unknown) must have been left out.
        rng: for the null.
        least: occurrences that an id needs.
        draws: of the null.
    """
    number_R, ids = numbered(token_R)
    often_V = np.bincount(number_R, minlength=ids) >= least
    if not often_V.any():
        return None

    def value(numbers_R: Array) -> float:
        shares_VN = _shares(used_RN, numbers_R, ids)
        return float(shares_VN[often_V].max(axis=1).mean())

    chance = np.array([value(rng.permutation(number_R)) for _ in range(draws)])
    mine = value(number_R)
    return Vocabulary(mine, against(mine, chance, "token ids permuted over the text"), int(often_V.sum()))


def top_tokens(used_RN: Array, token_R: Array, top: int = 5, least: int = LEAST) -> list[list[TopToken]]:
    """Return for each expert the tokens that it sees most beyond its share, largest lift first.

    ``lift = P(expert | token) / P(expert)``.
    """
    values, number_R = np.unique(token_R, return_inverse=True)
    counts_V = np.bincount(number_R, minlength=len(values))
    shares_VN = _shares(used_RN, number_R, len(values))
    mean_N = used_RN.mean(axis=0)
    lift_VN = np.where(counts_V[:, None] >= least, shares_VN, 0.0) / np.where(mean_N > 0, mean_N, np.inf)
    found = []
    for expert in range(used_RN.shape[1]):
        # Among tokens that always use the expert, the more frequent ones say more.
        order = np.lexsort((-counts_V, -np.round(lift_VN[:, expert], 3)))[:top]
        found.append(
            [
                TopToken(
                    int(values[v]),
                    round(float(shares_VN[v, expert] * counts_V[v])),
                    float(lift_VN[v, expert]),
                )
                for v in order
                if lift_VN[v, expert] > 1
            ]
        )
    return found


def _shares(used_RN: Array, number_R: Array, ids: int) -> Array:
    """``[V, N]``: share of an id's occurrences that use each expert."""
    counts_V = np.bincount(number_R, minlength=ids)
    return np.asarray(counted(used_RN, number_R, ids) / np.maximum(counts_V, 1)[:, None])
