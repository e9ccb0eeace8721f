"""From scores of all experts to a forecast."""

import numpy as np
from numpy.typing import ArrayLike

from gangline.core.forecast import Forecast


def forecast(
    step: int, layer: int, scores_E: ArrayLike, horizon: int, source: str, keep: int | None = None
) -> Forecast:
    """Rank experts by descending score (ties: ascending id); zeros and all beyond ``keep`` are left out."""
    scores = np.asarray(scores_E, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")[:keep]
    order = order[scores[order] > 0]
    return Forecast(
        step, layer, tuple(order.tolist()), tuple(scores[order].tolist()), horizon=horizon, source=source
    )


def recall(predicted: Forecast, used: tuple[int, ...], top_k: int) -> float:
    """Return the share of ``used`` experts among the first ``top_k`` of a forecast (1 if none are used)."""
    return len(set(predicted.experts[:top_k]).intersection(used)) / len(used) if used else 1.0
