"""Slots per layer by expected misses.

"AdapMoE: Adaptive Sensitivity-based Expert Gating and Management for Efficient MoE Inference" (arXiv
2408.10284) minimises the expected demand loads of all layers with a knapsack over slots, for models with two
experts per token. :func:`by_misses` does the same for any top-k from measured miss curves; greedy by the
largest saving is optimal where the curves are convex, the knapsack always.
"""

from collections.abc import Sequence

import numpy as np


def adapmoe_loads(slots: int, experts: int, accuracy: float, single: float) -> float:
    """Return a layer's expected demand loads per token.

    Args:
        slots: slots s of the layer.
        experts: experts N of the layer.
        accuracy: share beta of predictions that were right and prefetched.
        single: share alpha of tokens that use one expert only (0 where gating is not changed).
    """
    absent = 1 - slots / experts
    both = (experts - slots) * (experts - slots - 1) / (experts * (experts - 1))
    one = (experts - slots) * slots / (experts * (experts - 1))
    wrong = 1 - accuracy
    pair = 2 * both * wrong + both * accuracy + 2 * one * wrong
    return single * absent * wrong + (1 - single) * pair


def knapsack(loads_LS: Sequence[Sequence[float]], slots: int) -> list[int]:
    """Return slots per layer with the least total load.

    Args:
        loads_LS: for each layer its loads with 0, 1, 2, ... slots.
        slots: slots in all; fewer are used only if all layers are full.
    """
    best_S = np.array([0.0])
    choices: list[list[int]] = []
    for loads in loads_LS:
        size = min(slots, len(best_S) + len(loads) - 2) + 1
        next_S, chosen = np.full(size, np.inf), [0] * size
        for total in range(size):
            for own in range(max(0, total - len(best_S) + 1), min(total, len(loads) - 1) + 1):
                value = best_S[total - own] + loads[own]
                if value < next_S[total]:
                    next_S[total], chosen[total] = value, own
        best_S = next_S
        choices.append(chosen)
    left, out = len(best_S) - 1, []
    for chosen in reversed(choices):
        out.append(chosen[left])
        left -= chosen[left]
    return out[::-1]


def by_misses(misses_LS: Sequence[Sequence[float]], slots: int) -> list[int]:
    """Give slots one by one to the layer that saves most misses; ``misses_LS`` as in :func:`knapsack`."""
    out = [0] * len(misses_LS)
    for _ in range(slots):
        savings = [
            (misses[n] - misses[n + 1], -layer)
            for layer, (misses, n) in enumerate(zip(misses_LS, out, strict=True))
            if n + 1 < len(misses)
        ]
        if not savings:
            break
        out[-max(savings)[1]] += 1
    return out
