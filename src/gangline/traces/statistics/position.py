"""What changes along a document: the load, and what a capacity limit would drop.

Drop towards the end: with a limit of ``factor * pairs / N`` tokens per expert, filled in the order of the
tokens, later tokens lose more of their experts (Xue et al., "OpenMoE", arXiv 2402.01739). The null fills in
random order ("random token selection"), which spreads the same drops over all positions. Inference without a
limit drops nothing; this says what training or serving with one would do.

Shape suffixes: R rows, N experts, P bins of positions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from gangline.traces.rows import Array, LayerRows
from gangline.traces.statistics.membership import kept, runs


@dataclass(frozen=True)
class PositionEffects:
    """By position in the document, in bins.

    Attributes:
        starts: first position of each bin.
        tokens: of each bin.
        distance: total variation distance between the bin's load and that of all other tokens, 0 to 1.
        distance_chance: the same for as many tokens of random positions.
        dropped: share of choices that the limit drops. dropped_chance: filled in random order.
    """

    starts: tuple[int, ...]
    tokens: tuple[int, ...]
    distance: tuple[float, ...]
    distance_chance: tuple[float, ...]
    dropped: tuple[float, ...]
    dropped_chance: tuple[float, ...]


def position_effects(
    rows: LayerRows,
    used_RN: Array,
    position_R: Array,
    doc_R: Array,
    starts: Array,
    rng: Generator,
    factor: float = 1.0,
) -> PositionEffects:
    """Measure one layer.

    Args:
        rows, used_RN: its routing; rows of one document stand together, in the order of positions.
        position_R: place in the document. doc_R: the document.
        starts: ascending first positions of the bins.
        rng: for the nulls.
        factor: capacity factor, applied within each document.
    """
    bin_R = np.searchsorted(starts, position_R, side="right") - 1
    shuffled_R = rng.permutation(bin_R)
    drops_R = dropped(rows, doc_R, used_RN.shape[1], factor)
    chance_R = dropped(rows, doc_R, used_RN.shape[1], factor, rng)
    tokens = np.bincount(bin_R, minlength=len(starts))
    choices = np.maximum(np.bincount(bin_R, weights=kept(rows).sum(axis=1), minlength=len(starts)), 1)
    bins = range(len(starts))
    return PositionEffects(
        starts=tuple(int(start) for start in starts),
        tokens=tuple(tokens.tolist()),
        distance=tuple(_distance(used_RN, bin_R == b) for b in bins),
        distance_chance=tuple(_distance(used_RN, shuffled_R == b) for b in bins),
        dropped=tuple((np.bincount(bin_R, weights=drops_R, minlength=len(starts)) / choices).tolist()),
        dropped_chance=tuple(
            (np.bincount(bin_R, weights=chance_R, minlength=len(starts)) / choices).tolist()
        ),
    )


def dropped(
    rows: LayerRows, doc_R: Array, experts: int, factor: float, rng: Generator | None = None
) -> Array:
    """Return ``[R]``: choices of each token that find their expert full.

    Args:
        rows: routing; rows of one document stand together, in order.
        doc_R: each document is one batch with a capacity of its own.
        experts: routed experts.
        factor: an expert takes ``ceil(factor * pairs / experts)`` tokens.
        rng: fill in random order instead of in the order of the tokens.
    """
    lost_R = np.zeros(len(doc_R), dtype=np.int64)
    keep_RK = kept(rows)
    for doc in runs(doc_R):
        token_S, slot_S = np.nonzero(keep_RK[doc])
        expert_S = rows.ids_RK[doc][token_S, slot_S]
        capacity = int(np.ceil(factor * len(token_S) / experts))
        turn_S = token_S if rng is None else rng.permutation(doc.stop - doc.start)[token_S]
        order = np.lexsort((turn_S, expert_S))
        begins = np.searchsorted(expert_S[order], np.arange(experts))
        rank = np.arange(len(order)) - begins[expert_S[order]]
        full = order[rank >= capacity]
        np.add.at(lost_R, doc.start + token_S[full], 1)
    return lost_R


def _distance(used_RN: Array, inside_R: Array) -> float:
    inside, outside = used_RN[inside_R].sum(axis=0), used_RN[~inside_R].sum(axis=0)
    if not inside.sum() or not outside.sum():
        return 0.0
    return float(np.abs(inside / inside.sum() - outside / outside.sum()).sum() / 2)
