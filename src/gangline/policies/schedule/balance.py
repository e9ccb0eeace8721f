"""Load balancing: which device holds which experts.

"Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference" (arXiv 2303.06182).
Every device holds E/D experts; minimise the largest deviation of a device's share from 1/D over layers and
batches. Greedy: by descending mean load to the least loaded device with room. Correlated: a device also
counts half the correlation of its load over time with the expert's, so that experts busy at the same time
are kept apart.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gangline.core.errors import UsageError


def greedy_placement(load_E: Sequence[float], devices: int) -> list[int]:
    """Return the device of each expert; every device gets exactly E/D.

    Raises:
        UsageError: the experts do not divide evenly.
    """
    room = _room(len(load_E), devices)
    left, total = [room] * devices, [0.0] * devices
    place = [0] * len(load_E)
    for expert in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        device = min((d for d in range(devices) if left[d]), key=lambda d: (total[d], d))
        place[expert] = device
        left[device] -= 1
        total[device] += load_E[expert]
    return place


def correlated_placement(load_BE: ArrayLike, devices: int, weight: float = 0.5) -> list[int]:
    """Return the device of each expert from loads of batches B; busy-together experts are kept apart.

    Args:
        load_BE: share of each batch's tokens per expert.
        devices: number of devices D.
        weight: how much Pearson's correlation counts beside the mean load (the paper: 0.5).

    Raises:
        UsageError: the experts do not divide evenly.
    """
    load = np.asarray(load_BE, dtype=np.float64)
    room = _room(load.shape[1], devices)
    left = [room] * devices
    now_DB = np.zeros((devices, load.shape[0]))
    place = [0] * load.shape[1]
    for expert in sorted(range(load.shape[1]), key=lambda e: (-load[:, e].mean(), e)):
        costs = [
            (now_DB[d].mean() + weight * _pearson(now_DB[d], load[:, expert]), d)
            for d in range(devices)
            if left[d]
        ]
        device = min(costs)[1]
        place[expert] = device
        left[device] -= 1
        now_DB[device] += load[:, expert]
    return place


def imbalance(load_BE: ArrayLike, place: Sequence[int], devices: int) -> float:
    """Return ``max |device share - 1/D|`` over batches and devices; rows of ``load_BE`` sum to 1."""
    load = np.asarray(load_BE, dtype=np.float64)
    onto_ED = np.eye(devices)[list(place)]
    return float(np.abs(load @ onto_ED - 1 / devices).max())


def _room(experts: int, devices: int) -> int:
    if experts % devices:
        raise UsageError(f"{experts} experts do not divide evenly over {devices} devices; choose a divisor")
    return experts // devices


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread > 0 else 0.0
