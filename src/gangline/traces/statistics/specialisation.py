"""Whether groups of texts (domains, languages, traces) use other experts than one another.

The share of a group's tokens whose top-k holds expert i, beside ``K/N``; for a layer the coefficient of
variation of an expert's share over groups (mean over experts, weighted by load) and the mean Jensen-Shannon
divergence between the load distributions of two groups. Documents, not tokens, are what varies: intervals
resample documents, the null deals the groups out to the documents anew.

Texts of different groups hold different tokens. :func:`matched` compares two groups as if both held each
token equally often; its null deals the groups out among the occurrences of each token.

Muennighoff et al., "OLMoE: Open Mixture-of-Experts Language Models" (arXiv 2409.02060).

Shape suffixes: R rows, N experts, D documents, G groups, S draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import counted, numbered
from gangline.traces.statistics.spread import Null, against, interval, jensen_shannon, resampled


@dataclass(frozen=True)
class Specialisation:
    """Groups compared in one layer.

    Attributes:
        shares: ``[G, N]`` share of the group's tokens that use the expert.
        variation: coefficient of variation of an expert's load over groups, weighted by its load.
        divergence: mean Jensen-Shannon divergence of two groups in bits, between 0 and 1.
        low, high: 95% of ``divergence``, bootstrap over documents.
        null: of ``divergence``, groups dealt out to documents anew.
    """

    shares: tuple[tuple[float, ...], ...]
    variation: float
    divergence: float
    low: float
    high: float
    null: Null


@dataclass(frozen=True)
class Matched:
    """Two groups compared on the tokens that both have.

    Attributes:
        tokens: different tokens in both.
        divergence: Jensen-Shannon divergence in bits, each token counted equally often in both groups.
        null: of it, groups dealt out among the occurrences of each token.
    """

    tokens: int
    divergence: float
    null: Null


def specialisation(
    used_RN: Array, doc_R: Array, group_D: Array, rng: Generator, draws: int = 1000
) -> Specialisation:
    """Compare groups of documents in one layer.

    Args:
        used_RN: experts of each token.
        doc_R: its document, numbered from 0.
        group_D: each document's group, numbered from 0; at least two groups.
        rng: for intervals and null.
        draws: of both.
    """
    documents, groups = len(group_D), int(group_D.max()) + 1
    counts_DN = counted(used_RN, doc_R, documents)
    tokens_D = np.bincount(doc_R, minlength=documents)
    member_GD = np.arange(groups)[:, None] == group_D
    counts_GN = member_GD @ counts_DN
    load_GN = counts_GN / counts_GN.sum(axis=1, keepdims=True)
    value = float(divergence(load_GN[None])[0])
    chance = np.stack([rng.permutation(group_D) for _ in range(draws)])
    chance_SGD = np.arange(groups)[None, :, None] == chance[:, None, :]
    null = against(value, _divergences(chance_SGD, counts_DN), "groups dealt out to documents anew")
    again_SGD = np.zeros((draws, groups, documents))
    for group in range(groups):
        mine = np.flatnonzero(group_D == group)
        again_SGD[:, group, mine] = resampled(len(mine), draws, rng)
    low, high = interval(_divergences(again_SGD, counts_DN))
    shares_GN = counts_GN / (member_GD @ tokens_D)[:, None]
    mean_N = load_GN.mean(axis=0)
    variation_N = load_GN.std(axis=0) / np.where(mean_N > 0, mean_N, 1)
    return Specialisation(
        tuple(tuple(row) for row in shares_GN.tolist()), float(variation_N @ mean_N), value, low, high, null
    )


def divergence(load_SGN: Array) -> Array:
    """Return ``[S]``: the mean Jensen-Shannon divergence in bits over all pairs of G distributions."""
    groups = load_SGN.shape[1]
    pairs = [(a, b) for a in range(groups) for b in range(a)]
    found = [jensen_shannon(load_SGN[:, a], load_SGN[:, b]) for a, b in pairs]
    return np.asarray(np.mean(found, axis=0) / np.log(2))


def matched(
    used_RN: Array, token_R: Array, group_R: Array, rng: Generator, draws: int = 20
) -> Matched | None:
    """Compare groups 0 and 1 with each token counted equally often; None if they share no token.

    Args:
        used_RN: experts of the rows of both groups.
        token_R: each row's token id.
        group_R: 0 or 1.
        rng: for the null.
        draws: of the null.
    """
    token_R, tokens = numbered(token_R)
    counts_V2 = np.zeros((tokens, 2))
    np.add.at(counts_V2, (token_R, group_R), 1)
    both_V = counts_V2.min(axis=1)
    if not both_V.any():
        return None
    # What a row weighs depends on its token and group only, and dealing groups out within a token keeps both.
    rows = both_V[token_R] > 0
    used_RN, token_R, group_R = used_RN[rows].astype(float), token_R[rows], group_R[rows]
    weight_V2 = both_V[:, None] / np.maximum(counts_V2, 1)

    def value(groups_R: Array) -> float:
        weight_R = weight_V2[token_R, groups_R]
        load_GN = np.stack([np.where(groups_R == g, weight_R, 0.0) @ used_RN for g in (0, 1)])
        return float(divergence((load_GN / load_GN.sum(axis=1, keepdims=True))[None])[0])

    by_token = np.lexsort((group_R, token_R))
    chance = []
    for _ in range(draws):
        dealt = np.empty_like(group_R)
        dealt[np.lexsort((rng.random(len(token_R)), token_R))] = group_R[by_token]
        chance.append(value(dealt))
    null = against(value(group_R), np.array(chance), "groups dealt out among the occurrences of each token")
    return Matched(int((both_V > 0).sum()), value(group_R), null)


def _divergences(member_SGD: Array, counts_DN: Array) -> Array:
    counts_SGN = member_SGD.astype(float) @ counts_DN
    return divergence(counts_SGN / np.maximum(counts_SGN.sum(axis=2, keepdims=True), 1))
