"""How evenly a layer uses its experts.

MaxVio is of Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv
2408.15664). The null is chance: as many choices as were made, each expert equally likely.

Shape suffixes: N experts, S draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import counted, numbered
from gangline.traces.statistics.spread import Null, against, entropy

COLD = 0.1
"""An expert is cold if it has less than this share of the mean load."""


@dataclass(frozen=True)
class ExpertLoad:
    """The load of one layer.

    Attributes:
        counts: pairs of token and slot, for each expert.
        max_violation: ``max / mean - 1``.
        variation: standard deviation over mean.
        gini: 0 where all are equal, ``1 - 1/N`` where one has all.
        entropy: of the shares, divided by ``log N``: 1 where all are equal.
        dead: experts that nobody chose; ``cold`` those below a tenth of the mean, dead ones included.
        max_violation_null: of chance, at this many choices.
        dead_null, cold_null: what chance gives on average.
    """

    counts: tuple[int, ...]
    max_violation: float
    variation: float
    gini: float
    entropy: float
    dead: int
    cold: int
    max_violation_null: Null
    dead_null: float
    cold_null: float


def expert_load(counts_N: Array, rng: Generator, draws: int = 200) -> ExpertLoad:
    """Sum up how a layer's choices fall on its experts.

    Args:
        counts_N: choices of each expert; at least one in all.
        rng: for the null.
        draws: of the null.
    """
    counts_N = np.asarray(counts_N, dtype=np.int64)
    experts, total = len(counts_N), int(counts_N.sum())
    chance_SN = rng.multinomial(total, np.full(experts, 1 / experts), size=draws)
    mean = total / experts
    null = against(
        _violation(counts_N), chance_SN.max(axis=1) / mean - 1, "as many choices, every expert equally likely"
    )
    return ExpertLoad(
        counts=tuple(counts_N.tolist()),
        max_violation=_violation(counts_N),
        variation=float(counts_N.std() / mean),
        gini=gini(counts_N),
        entropy=float(entropy(counts_N / total) / np.log(experts)) if experts > 1 else 1.0,
        dead=int((counts_N == 0).sum()),
        cold=int((counts_N < COLD * mean).sum()),
        max_violation_null=null,
        dead_null=float((chance_SN == 0).sum(axis=1).mean()),
        cold_null=float((chance_SN < COLD * mean).sum(axis=1).mean()),
    )


def violation_by_document(used_RN: Array, doc_R: Array) -> float:
    """Return MaxVio within each document, averaged over documents.

    A model that was balanced over batches is uneven within a document; both numbers belong in a report.
    """
    number_R, documents = numbered(doc_R)
    counts_DN = counted(used_RN, number_R, documents)
    counts_DN = counts_DN[counts_DN.sum(axis=1) > 0]
    return float(np.mean(counts_DN.max(axis=1) / counts_DN.mean(axis=1) - 1))


def gini(counts_N: Array) -> float:
    """Return the Gini coefficient of non-negative numbers with a sum above zero."""
    ordered = np.sort(np.asarray(counts_N, dtype=float))
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def _violation(counts_N: Array) -> float:
    return float(counts_N.max() / counts_N.mean() - 1)
