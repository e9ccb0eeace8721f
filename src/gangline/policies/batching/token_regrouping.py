"""ExpertFlow's token scheduler: regroup two batches so that each needs fewer distinct experts.

"ExpertFlow: Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token Scheduling"
(arXiv 2410.17954). The 2T tokens of two decode batches have binary routing paths over all layers and
experts; similarity is one minus the normalised Hamming distance. A k-means-like split into two equal groups
around medoids lowers R1 + R2, the distinct (layer, expert) pairs of the groups. We return the given grouping
where the split is not better, so it never loses. The KV caches of moved tokens must move along.
"""

import numpy as np
from numpy.typing import NDArray


def distinct_experts(path_TX: NDArray[np.bool_]) -> int:
    """Return how many (layer, expert) pairs a group of paths needs."""
    return int(path_TX.any(axis=0).sum())


def regroup(path_TX: NDArray[np.bool_], rounds: int = 10) -> tuple[list[int], list[int]]:
    """Split an even number of tokens into two equal groups.

    Args:
        path_TX: routing paths ``[2T, L*E]``, first batch first.
        rounds: medoid updates at most.

    Returns:
        The tokens of each group, ascending.
    """
    half = len(path_TX) // 2
    given = (list(range(half)), list(range(half, 2 * half)))
    if half == 0:
        return given
    x_TX = path_TX.astype(np.float64)
    ones_T = x_TX.sum(axis=1)
    similarity_TT = 1 - (ones_T[:, None] + ones_T[None, :] - 2 * x_TX @ x_TX.T) / path_TX.shape[1]
    medoids = np.unravel_index(np.argmin(similarity_TT), similarity_TT.shape)
    best, fewest = given, _total(path_TX, given)
    for _ in range(rounds):
        groups = _assign(similarity_TT, int(medoids[0]), int(medoids[1]), half)
        if (total := _total(path_TX, groups)) < fewest:
            best, fewest = groups, total
        moved = tuple(
            group[int(similarity_TT[np.ix_(group, group)].mean(axis=1).argmax())] for group in groups
        )
        if moved == tuple(int(m) for m in medoids):
            break
        medoids = (np.intp(moved[0]), np.intp(moved[1]))
    return best


def _assign(
    similarity_TT: NDArray[np.float64], first: int, second: int, half: int
) -> tuple[list[int], list[int]]:
    """Give the tokens that lean most to the first medoid to it, half of them all."""
    lean_T = similarity_TT[first] - similarity_TT[second]
    order = np.argsort(-lean_T, kind="stable").tolist()
    return sorted(order[:half]), sorted(order[half : 2 * half])


def _total(path_TX: NDArray[np.bool_], groups: tuple[list[int], list[int]]) -> int:
    return sum(distinct_experts(path_TX[group]) for group in groups)
