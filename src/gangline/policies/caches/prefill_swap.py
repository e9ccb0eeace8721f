"""DAOP's swap after the prompt: what the prompt used takes the place of what it did not. Exact.

"DAOP: Data-Aware Offloading and Predictive Pre-Calculation for Efficient MoE Inference" (arXiv 2501.10375).
In each layer the hottest absent expert is paired with the coldest resident one while it has clearly more
tokens, for the prompt's use of experts resembles that of the answer (0.91). Its second part, computing
predicted experts ahead on stale inputs, changes the output and is not here.
"""

from collections.abc import Collection, Sequence


def swaps(
    tokens_E: Sequence[int], resident: Collection[int], ratio: float = 1.05, most: int | None = None
) -> list[tuple[int, int]]:
    """Return pairs ``(comes, goes)`` for one layer, hottest first.

    Args:
        tokens_E: tokens of the prompt per expert.
        resident: resident experts of the layer.
        ratio: how many times more tokens the newcomer needs.
        most: pairs at most; half of the experts by default.
    """
    hot = sorted(set(range(len(tokens_E))).difference(resident), key=lambda e: (-tokens_E[e], e))
    cold = sorted(resident, key=lambda e: (tokens_E[e], e))
    limit = len(tokens_E) // 2 if most is None else most
    return [
        (comes, goes)
        for comes, goes in list(zip(hot, cold, strict=False))[:limit]
        if tokens_E[comes] > ratio * tokens_E[goes]
    ]
