"""Local routing consistency: SRP(m), the segment routing best performance.

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv
2505.16056). A window is m consecutive tokens of one document, at every position; f is how many of them use an
expert. A segment router calls an expert on for a whole window iff ``f >= alpha``. Over all windows and all
experts of a group, with one alpha for all (counts are pooled before the maximum, not averaged after it):

    SRP(m) = max over alpha of F1 = 2 sum_{f >= alpha} f / (m #{f >= alpha} + sum f)
    rho_hat = m #{f >= alpha*} / sum f

rho_hat is how many experts the segment router runs for each one that is used. The closed floor 2q/(1+q) of
random routing at rate q holds for large m only, so the null is the same trace with its tokens in random
order.

Shape suffixes: R rows, N experts, D documents, B bins of a histogram (m + 1), S draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import runs
from gangline.traces.statistics.spread import interval, resampled

WINDOWS = (4, 16, 64, 256)
"""Window lengths of the paper."""


@dataclass(frozen=True)
class SegmentRouting:
    """The best segment router of a group of experts.

    Attributes:
        window: m. alpha: the best threshold.
        srp: its F1. rho_hat: experts run per expert used.
        low, high: 95% of SRP, bootstrap over documents; None where it was not asked for.
        windows: how many windows there were; documents shorter than m give none.
    """

    window: int
    srp: float
    rho_hat: float
    alpha: int
    windows: int
    low: float | None = None
    high: float | None = None


def window_counts(used_RN: Array, doc_R: Array, window: int) -> tuple[Array, Array]:
    """Return how many windows have 0 ... m uses: by document ``[D, m + 1]`` and by expert ``[N, m + 1]``.

    Args:
        used_RN: rows of one document stand together.
        doc_R: each row's document.
        window: m.
    """
    experts = used_RN.shape[1]
    by_document, by_expert = [], np.zeros((experts, window + 1), dtype=np.int64)
    for rows in runs(doc_R):
        tokens = rows.stop - rows.start
        if tokens < window:
            by_document.append(np.zeros(window + 1, dtype=np.int64))
            continue
        sums = np.zeros((tokens + 1, experts), dtype=np.int32)
        np.cumsum(used_RN[rows], axis=0, out=sums[1:])
        f_WN = sums[window:] - sums[:-window]
        flat = np.bincount(
            (f_WN + np.arange(experts) * (window + 1)).ravel(), minlength=experts * (window + 1)
        )
        mine = flat.reshape(experts, window + 1)
        by_document.append(mine.sum(axis=0))
        by_expert += mine
    return np.array(by_document), by_expert


def segment_routing(
    counts_DB: Array, rng: Generator | None = None, draws: int = 1000
) -> SegmentRouting | None:
    """Return the best segment router; None where no window, or no use, was seen.

    Args:
        counts_DB: windows by document and uses, summed over the experts (and layers) of the group.
        rng: to also draw an interval.
        draws: of the bootstrap.
    """
    window = counts_DB.shape[1] - 1
    total_B = counts_DB.sum(axis=0)
    f1_B = _f1(total_B[None].astype(float))[0]
    if not np.isfinite(f1_B).all():
        return None
    best = int(np.argmax(f1_B))
    called = int(total_B[best + 1 :].sum())
    uses = float(np.arange(window + 1) @ total_B)
    low = high = None
    if rng is not None:
        has_windows = counts_DB[counts_DB.sum(axis=1) > 0]
        times_SD = resampled(len(has_windows), draws, rng)
        again = _f1((times_SD @ has_windows).astype(float)).max(axis=1)
        low, high = interval(again[np.isfinite(again)])
    experts_windows = int(total_B.sum())
    return SegmentRouting(
        window, float(f1_B[best]), window * called / uses, best + 1, experts_windows, low, high
    )


def _f1(counts_SB: Array) -> Array:
    """F1 of alpha = 1 ... m, for each row of counts."""
    window = counts_SB.shape[1] - 1
    uses_SB = counts_SB * np.arange(window + 1)
    called = np.cumsum(counts_SB[:, :0:-1], axis=1)[:, ::-1]
    found = np.cumsum(uses_SB[:, :0:-1], axis=1)[:, ::-1]
    total = uses_SB.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(total > 0, 2 * found / (window * called + total), np.nan))
