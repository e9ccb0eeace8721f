"""A layer's routing as a table of who used what, which all statistics count on.

Shape suffixes: R rows (tokens), K slots, N experts.
"""

from collections.abc import Iterator

import numpy as np

from gangline.traces.rows import Array, LayerRows


def used(rows: LayerRows, experts: int) -> Array:
    """Return ``[R, N]``, True where a token chose an expert."""
    used_RN = np.zeros((len(rows.ids_RK), experts), dtype=bool)
    row_S, slot_S = np.nonzero(kept(rows))
    used_RN[row_S, rows.ids_RK[row_S, slot_S]] = True
    return used_RN


def kept(rows: LayerRows) -> Array:
    """Return ``[R, K]``, True where a slot holds an expert."""
    return np.ones(rows.ids_RK.shape, dtype=bool) if rows.keep_RK is None else rows.keep_RK


def first_choice(rows: LayerRows) -> Array:
    """Return ``[R]``: the expert of the largest weight; of the first slot where no weights were recorded."""
    if rows.weights_RK is None:
        return rows.ids_RK[:, 0]
    best_R = np.where(kept(rows), rows.weights_RK, -np.inf).argmax(axis=1)
    return np.asarray(rows.ids_RK[np.arange(len(best_R)), best_R])


def runs(values_R: Array) -> Iterator[slice]:
    """Yield the slices in which a column stays the same, for example the documents."""
    starts = np.flatnonzero(np.diff(values_R, prepend=values_R[:1] - 1))
    for start, stop in zip(starts, [*starts[1:], len(values_R)], strict=True):
        yield slice(int(start), int(stop))


def numbered(values_R: Array) -> tuple[Array, int]:
    """Return each row's value as a number from 0, and how many values there are."""
    found, number_R = np.unique(values_R, return_inverse=True)
    return number_R.reshape(-1), len(found)


def counted(used_RN: Array, group_R: Array, groups: int) -> Array:
    """Return ``[groups, N]``: tokens of each group that chose each expert."""
    order = np.argsort(group_R, kind="stable")
    ends = np.searchsorted(group_R[order], np.arange(groups + 1))
    sums = np.concatenate([np.zeros((1, used_RN.shape[1])), np.cumsum(used_RN[order], axis=0, dtype=float)])
    return np.asarray(sums[ends[1:]] - sums[ends[:-1]])
