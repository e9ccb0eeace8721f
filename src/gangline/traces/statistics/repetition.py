"""How often a token uses the experts of the token before it.

The null for the first choice is ``sum q_i^2`` from the loads; for any of the K experts it is the same text
with its tokens in random order. Jiang et al., "Mixtral of Experts" (arXiv 2401.04088).

Shape suffixes: R rows, N experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array


@dataclass(frozen=True)
class Repetition:
    """Shares of consecutive tokens of a document.

    Attributes:
        first: the first choice is the same. first_chance: from the loads.
        any: at least one expert is the same. any_chance: tokens in random order.
        overlap: mean share of a token's experts that the token before it used as well.
        overlap_chance: tokens in random order.
    """

    first: float
    first_chance: float
    any: float
    any_chance: float
    overlap: float
    overlap_chance: float


def repetition(first_R: Array, used_RN: Array, doc_R: Array, rng: Generator) -> Repetition | None:
    """Measure repetition over rows in the order of their documents; None if no document has two tokens.

    Args:
        first_R: each token's first choice.
        used_RN: all its experts.
        doc_R: its document; rows of one document stand together.
        rng: for the order of the null.
    """
    same = doc_R[1:] == doc_R[:-1]
    if not same.any():
        return None
    share_N = np.bincount(first_R) / len(first_R)
    any_, overlap = _shared(used_RN, same)
    any_chance, overlap_chance = _shared(rng.permutation(used_RN), same)
    return Repetition(
        first=float((first_R[1:] == first_R[:-1])[same].mean()),
        first_chance=float(share_N @ share_N),
        any=any_,
        any_chance=any_chance,
        overlap=overlap,
        overlap_chance=overlap_chance,
    )


def _shared(used_RN: Array, same: Array) -> tuple[float, float]:
    common = (used_RN[1:] & used_RN[:-1]).sum(axis=1)[same]
    own = np.maximum(used_RN[1:].sum(axis=1)[same], 1)
    return float((common > 0).mean()), float((common / own).mean())
