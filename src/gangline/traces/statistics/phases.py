"""Whether reading a prompt and decoding use the same experts.

Pearson's correlation of the loads of prefill and decoding, beside that of two random halves of the decoded
tokens (what sampling alone leaves of a perfect agreement).

Shape suffixes: R rows, N experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array


@dataclass(frozen=True)
class Phases:
    """Loads of both phases in one layer; a correlation is None where a load is the same for all experts."""

    correlation: float | None
    ceiling: float | None


def phases(used_RN: Array, decode_R: Array, rng: Generator) -> Phases:
    """Compare prefill and decoding.

    Args:
        used_RN: experts of each token.
        decode_R: True where the token was decoded; both kinds occur.
        rng: for the halves.
    """
    decoded = used_RN[decode_R]
    half = rng.random(len(decoded)) < 0.5
    return Phases(
        correlation(used_RN[~decode_R].sum(axis=0), decoded.sum(axis=0)),
        correlation(decoded[half].sum(axis=0), decoded[~half].sum(axis=0)),
    )


def correlation(one_N: Array, other_N: Array) -> float | None:
    """Return Pearson's correlation; None if one of them does not vary."""
    if not np.std(one_N) or not np.std(other_N):
        return None
    return float(np.corrcoef(one_N, other_N)[0, 1])
