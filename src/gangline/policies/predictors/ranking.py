"""From scores of all experts to a forecast."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


def ranked(
    steps: Sequence[int],
    layers: Sequence[int],
    scores: Sequence[NDArray[np.float64]],
    horizons: Sequence[int],
    source: str,
) -> list[Forecast]:
    """Return :func:`forecast` for several layers, in fewer calls where they have equally many experts.

    Args:
        steps, layers, horizons: of each forecast.
        scores: of the experts of each layer.
        source: name of the predictor.
    """
    if len({len(scores_E) for scores_E in scores}) != 1:
        return [
            forecast(step, layer, scores_E, horizon, source)
            for step, layer, scores_E, horizon in zip(steps, layers, scores, horizons, strict=True)
        ]
    scores_LE = np.stack(scores)
    order_LE = np.argsort(-scores_LE, axis=1, kind="stable")
    sorted_LE = np.take_along_axis(scores_LE, order_LE, axis=1)
    out = []
    for step, layer, horizon, experts, values in zip(
        steps, layers, horizons, order_LE.tolist(), sorted_LE.tolist(), strict=True
    ):
        if values[-1] <= 0:
            values = [value for value in values if value > 0]
            experts = experts[: len(values)]
        out.append(Forecast(step, layer, tuple(experts), tuple(values), horizon=horizon, source=source))
    return out


def recall(predicted: Forecast, used: tuple[int, ...], top_k: int) -> float:
    """Return the share of ``used`` experts among the first ``top_k`` of a forecast (1 if none are used)."""
    return len(set(predicted.experts[:top_k]).intersection(used)) / len(used) if used else 1.0
