"""How many slots each layer may hold for good, and how many stay free for streaming."""

from collections.abc import Sequence


def layer_quotas(slots: int, top_k: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Split ``slots`` between layers.

    One layer's top-k slots stay a common ring for experts passing through (at most half of all slots). If
    every layer can hold its top-k, the rest is dealt out evenly in steps of one, never above a layer's expert
    count. If not, as many layers as possible get their top-k and the others stream: one global pool smaller
    than a token's working set would be flushed by every token and never hit.

    Args:
        slots: slots in all.
        top_k: experts per token, for each layer.
        experts: routed experts, for each layer.
    """
    if slots >= sum(experts):
        return list(experts)
    budget = slots - min(max(top_k), slots // 2)
    quotas = [0] * len(top_k)
    for layer, k in enumerate(top_k):
        if budget >= k:
            quotas[layer], budget = k, budget - k
    if any(quota < k for quota, k in zip(quotas, top_k, strict=True)):
        return quotas
    while budget > 0:
        open_layers = [layer for layer, quota in enumerate(quotas) if quota < experts[layer]]
        if not open_layers:
            break
        share = max(1, budget // len(open_layers))
        for layer in open_layers:
            step = min(share, experts[layer] - quotas[layer], budget)
            quotas[layer], budget = quotas[layer] + step, budget - step
    return quotas
