"""SCH(m, rho), the segment cache best hit rate, in both of its published definitions.

"Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models" (arXiv
2505.16056). Each layer has its own cache of ``rho * K`` experts that knows the coming m tokens.

* ``windows`` (the paper's first version): of every window the cache holds the most used experts; hits are
  their uses over all uses.
* ``sliding`` (the released code later on): on a miss the resident leaves that the next m tokens use least,
  ties go to the older; first touches count as hits while there are free slots. The cache starts empty in
  every document.

Neither is an upper bound: compare with Belady's cache, and with LRU and LFU.

Shape suffixes: L layers, R rows, N experts, W windows.
"""

import numpy as np

from gangline.traces.rows import Array
from gangline.traces.statistics.membership import runs


def windows(used_RN: Array, doc_R: Array, window: int, slots: int) -> tuple[int, int]:
    """Return hits and uses of the cache that is set anew for every window.

    Args:
        used_RN: one layer; rows of one document stand together.
        doc_R: each row's document; no window spans two.
        window: m.
        slots: experts of this layer that the cache holds.
    """
    hits = uses = 0
    slots = min(slots, used_RN.shape[1])
    for rows in runs(doc_R):
        if rows.stop - rows.start < window:
            continue
        f_WN = _sums(used_RN[rows], window)
        hits += int(np.sort(f_WN, axis=1)[:, -slots:].sum())
        uses += int(f_WN.sum())
    return hits, uses


def sliding(used_LRN: Array, doc_R: Array, window: int, slots: int) -> tuple[int, int]:
    """Return hits and uses of the cache that evicts what the next ``window`` tokens use least.

    Args:
        used_LRN: layers with the same number of experts; rows of one document stand together.
        doc_R: each row's document.
        window: m; the present token is not part of it.
        slots: experts of each layer that the cache holds; at least the experts of one token.
    """
    hits = uses = 0
    for rows in runs(doc_R):
        found, seen = _slide(used_LRN[:, rows], window, min(slots, used_LRN.shape[2]))
        hits, uses = hits + found, uses + seen
    return hits, uses


def _slide(used_LTN: Array, window: int, slots: int) -> tuple[int, int]:
    layers, tokens, experts = used_LTN.shape
    sums = np.zeros((layers, tokens + window + 1, experts), dtype=np.int32)
    np.cumsum(used_LTN, axis=1, out=sums[:, 1 : tokens + 1])
    sums[:, tokens + 1 :] = sums[:, tokens : tokens + 1]
    resident_LN = np.zeros((layers, experts), dtype=bool)
    last_LN = np.full((layers, experts), -1, dtype=np.int64)
    hits = 0
    for token in range(tokens):
        now_LN = used_LTN[:, token]
        free_L = slots - resident_LN.sum(axis=1)
        misses_L = (now_LN & ~resident_LN).sum(axis=1)
        hits += int((now_LN & resident_LN).sum() + np.minimum(free_L, misses_L).sum())
        last_LN[now_LN] = token
        wanted_LN = resident_LN | now_LN
        coming_LN = (sums[:, token + 1 + window] - sums[:, token + 1]).astype(np.int64)
        # Larger stays: this token's own experts, then uses to come, then the later last use.
        worth_LN = (coming_LN + now_LN * (window + 1)) * (tokens + 1) + last_LN
        worth_LN = np.where(wanted_LN, worth_LN, -1)
        cut_L1 = np.sort(worth_LN, axis=1)[:, -slots][:, None]
        resident_LN = wanted_LN & (worth_LN >= np.maximum(cut_L1, 0))
        resident_LN = _trimmed(resident_LN, worth_LN, slots)
    return hits, int(used_LTN.sum())


def _trimmed(resident_LN: Array, worth_LN: Array, slots: int) -> Array:
    """Of experts that are worth exactly the same, the ones with the lower ids leave."""
    over = np.flatnonzero(resident_LN.sum(axis=1) > slots)
    for layer in over:
        order = np.argsort(worth_LN[layer], kind="stable")
        resident_LN[layer, order[:-slots]] = False
    return resident_LN


def _sums(used_TN: Array, window: int) -> Array:
    sums = np.zeros((len(used_TN) + 1, used_TN.shape[1]), dtype=np.int32)
    np.cumsum(used_TN, axis=0, out=sums[1:])
    return np.asarray(sums[window:] - sums[:-window])
