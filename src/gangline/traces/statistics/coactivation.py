"""Which experts of a layer are used together.

``lift(i, j) = n_ij T / (n_i n_j)`` (symmetric), 1 where the two are chosen independently of each other; ``P(j
| i) = n_ij / n_i`` (not symmetric). Experts of one token are never independent (there are only K slots), so
the null is not 1: it shuffles the slots between tokens and keeps how often each expert is used and how many
experts each token has.

Shape suffixes: R rows, K slots, N experts, S draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array, LayerRows
from gangline.traces.statistics.membership import kept, used
from gangline.traces.statistics.spread import Null, against

_ROUNDS_PER_SLOT = 12


@dataclass(frozen=True)
class Pair:
    """Two experts: tokens that chose both, the lift, and standard deviations above the null."""

    first: int
    second: int
    together: int
    lift: float
    deviations: float


@dataclass(frozen=True)
class Coactivation:
    """Experts chosen together in one layer.

    Attributes:
        together: ``[N, N]`` tokens that chose both; the diagonal holds each one's own.
        excess: half the sum of ``|n_ij - null mean|`` over all pairs, as a share of all pairs: how much of
            the co-activation is more than the loads explain.
        null: of ``excess``.
        pairs: those furthest above the null, strongest first.
    """

    together: tuple[tuple[int, ...], ...]
    excess: float
    null: Null
    pairs: tuple[Pair, ...]


def coactivation(
    rows: LayerRows, experts: int, rng: Generator, draws: int = 20, top: int = 10
) -> Coactivation:
    """Count pairs and compare them with shuffled slots.

    Args:
        rows: routing of one layer, at least two slots per token.
        experts: routed experts.
        rng: for the null.
        draws: of the null; two at least.
        top: how many pairs to name.
    """
    together_NN = pair_counts(used(rows, experts))
    keep_RK, ids_RK = kept(rows), rows.ids_RK.copy()
    null_SNN = np.empty((draws, experts, experts))
    for draw in range(draws):
        ids_RK = shuffle_slots(ids_RK, keep_RK, experts, rng)
        null_SNN[draw] = pair_counts(used(LayerRows(ids_RK, rows.keep_RK), experts))
    mean_NN, spread_NN = null_SNN.mean(axis=0), null_SNN.std(axis=0, ddof=1)
    # Each draw is held against the others, so that the null is as far from its mean as the real counts are.
    rest_SNN = (null_SNN.sum(axis=0) - null_SNN) / max(1, draws - 1)
    excess = _excess(together_NN, mean_NN)
    chance_S = np.array([_excess(one, rest) for one, rest in zip(null_SNN, rest_SNN, strict=True)])
    null = against(excess, chance_S, "slots shuffled between tokens; loads and slots per token kept")
    deviations_NN = (together_NN - mean_NN) / np.maximum(spread_NN, 1.0)
    return Coactivation(
        tuple(tuple(row) for row in together_NN.tolist()),
        excess,
        null,
        tuple(_strongest(together_NN, deviations_NN, len(ids_RK), top)),
    )


def pair_counts(used_RN: Array) -> Array:
    """Return ``[N, N]``: tokens that chose both experts."""
    used_float = used_RN.astype(np.float32)
    return np.asarray(np.rint(used_float.T @ used_float), dtype=np.int64)


def lift(together_NN: Array, tokens: int) -> Array:
    """Return ``n_ij T / (n_i n_j)``; nan where an expert was never used."""
    own_N = np.diag(together_NN).astype(float)
    expected_NN = np.outer(own_N, own_N) / tokens
    ratio = together_NN / np.where(expected_NN > 0, expected_NN, 1.0)
    return np.asarray(np.where(expected_NN > 0, ratio, np.nan))


def shuffle_slots(ids_RK: Array, keep_RK: Array, experts: int, rng: Generator) -> Array:
    """Return ids in which random pairs of tokens have swapped random slots, many times.

    Every expert keeps its load, every token its number of slots, and no token has an expert twice.
    """
    ids_RK = ids_RK.copy()
    rows, slots = ids_RK.shape
    half = rows // 2
    taken_RN = np.zeros((rows, experts), dtype=bool)
    row_S, slot_S = np.nonzero(keep_RK)
    taken_RN[row_S, ids_RK[row_S, slot_S]] = True
    for _ in range(_ROUNDS_PER_SLOT * slots):
        order = rng.permutation(rows)
        a, b = order[:half], order[half : 2 * half]
        slot_a, slot_b = rng.integers(slots, size=half), rng.integers(slots, size=half)
        one, other = ids_RK[a, slot_a], ids_RK[b, slot_b]
        swap = keep_RK[a, slot_a] & keep_RK[b, slot_b] & ~taken_RN[a, other] & ~taken_RN[b, one]
        a, b, slot_a, slot_b, one, other = (part[swap] for part in (a, b, slot_a, slot_b, one, other))
        ids_RK[a, slot_a], ids_RK[b, slot_b] = other, one
        taken_RN[a, one] = taken_RN[b, other] = False
        taken_RN[a, other] = taken_RN[b, one] = True
    return ids_RK


def _excess(together_NN: Array, expected_NN: Array) -> float:
    upper = np.triu_indices(len(together_NN), k=1)
    total = float(expected_NN[upper].sum())
    return float(np.abs(together_NN[upper] - expected_NN[upper]).sum() / 2 / total) if total else 0.0


def _strongest(together_NN: Array, deviations_NN: Array, tokens: int, top: int) -> list[Pair]:
    lift_NN = lift(together_NN, tokens)
    first_P, second_P = np.triu_indices(len(together_NN), k=1)
    best = np.argsort(-deviations_NN[first_P, second_P], kind="stable")[:top]
    return [
        Pair(int(i), int(j), int(together_NN[i, j]), float(lift_NN[i, j]), float(deviations_NN[i, j]))
        for i, j in zip(first_P[best], second_P[best], strict=True)
        if together_NN[i, j]
    ]
