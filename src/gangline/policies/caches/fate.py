"""Fate's shallow-favouring cache.

"Accurate Expert Predictions in MoE Inference via Cross-Layer Gate" (Fate, arXiv 2502.12224). The first
layers are the hardest to predict, so all their experts stay; the other slots are spread evenly over the
deeper layers, where ARC replaces. How many layers count as shallow (3 to 4 in the paper) follows from the
predictor's accuracy on calibration text.
"""

from collections.abc import Sequence

from gangline.policies.caches.arc import ARC


class FateCache(ARC):
    """ARC within quotas that hold the first layers whole.

    Args:
        slots: slots in all.
        top_k: experts per token, for each layer.
        experts: routed experts of each layer.
        shallow: layers to hold whole; fewer if the others could not have their top-k.
    """

    def __init__(self, slots: int, top_k: Sequence[int], experts: Sequence[int], shallow: int = 3) -> None:
        super().__init__(slots, shallow_quotas(slots, top_k, experts, shallow))


def shallow_quotas(slots: int, top_k: Sequence[int], experts: Sequence[int], shallow: int) -> list[int]:
    """Give the first layers all their experts and share the rest evenly, never above an expert count."""
    whole = min(shallow, len(experts))
    while whole and sum(experts[:whole]) + sum(top_k[whole:]) > slots:
        whole -= 1
    quotas = [*experts[:whole], *[0] * (len(experts) - whole)]
    left = slots - sum(quotas)
    while left > 0:
        open_layers = [i for i in range(whole, len(experts)) if quotas[i] < experts[i]]
        if not open_layers:
            break
        share = max(1, left // len(open_layers))
        for layer in open_layers:
            step = min(share, experts[layer] - quotas[layer], left)
            quotas[layer], left = quotas[layer] + step, left - step
    return quotas


def shallow_layers(accuracy: Sequence[float], wanted: float) -> int:
    """Return how many leading layers are predicted worse than ``wanted`` (0 to 1)."""
    return next((layer for layer, value in enumerate(accuracy) if value >= wanted), len(accuracy))
