"""MoE-Infinity's trace matching.

"MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert Cache" (arXiv
2401.14361). The expert activation matrix (EAM) of a request counts tokens per layer and expert. A collection
of bounded size holds EAMs of past requests. After the router of layer l: find the stored EAMs closest to the
present one (cosine of the flattened matrices), add them up, and normalise each row (pEAM). At the end of a
request its EAM enters the collection; when that is full it takes the place of the most similar one, which
keeps it recent and diverse.

We differ in two points: rows are normalised before they are compared, for counts would let long prompts
dominate; and rows at or before l are forecast for the next pass, which decoding can use. Equal matches are
all added up, so that the order of the collection does not matter.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.ranking import ranked


class TraceMatching(Predictor):
    """Forecasts all later layers from the most similar past requests.

    Args:
        experts: routed experts of each layer.
        capacity: stored EAMs (the paper: 120 for 290 tasks).
        neighbours: stored EAMs to add up.
    """

    def __init__(self, experts: Sequence[int], capacity: int = 120, neighbours: int = 1) -> None:
        self.experts, self.capacity, self.neighbours = list(experts), capacity, neighbours
        self.collection: list[NDArray[np.float64]] = []
        self._present = self._empty()
        self._stored = (self._empty()[None][:0], np.empty(0))
        self._held: list[NDArray[np.float64]] = []

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Count the event and forecast every other layer; nothing while the collection is empty."""
        self._present[event.layer, list(event.experts)] += event.counts
        if not self.collection:
            return []
        share_LE = self.predicted()
        horizons = range(1, len(self.experts) + 1)
        passes, layers = zip(
            *(divmod(event.layer + ahead, len(self.experts)) for ahead in horizons), strict=True
        )
        rows = [share_LE[layer, : self.experts[layer]] for layer in layers]
        return ranked([event.step + later for later in passes], layers, rows, horizons, "trace-matching")

    def predicted(self) -> NDArray[np.float64]:
        """Return pEAM ``[L, E]`` for the present request; rows sum to 1, or 0 where no match used a layer."""
        stored_NLE, norm_N = self._stacked()
        similarity_N = _cosine(stored_NLE, norm_N, _normalised(self._present))
        chosen = min(self.neighbours, len(self.collection))
        threshold = np.sort(similarity_N)[-chosen] - 1e-12
        return _normalised(stored_NLE[similarity_N >= threshold].sum(axis=0))

    def end_request(self) -> None:
        """Store the EAM of the request, in place of the most similar one if there is no room."""
        if not self._present.any():
            return
        eam_LE = _normalised(self._present)
        self._present = self._empty()
        if len(self.collection) < self.capacity:
            self.collection.append(eam_LE)
        else:
            nearest = int(np.argmax(_cosine(*self._stacked(), eam_LE)))
            self.collection[nearest] = eam_LE

    def _stacked(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the collection in one array ``[N, L, E]``, and the norm of each entry."""
        known = len(self._held) == len(self.collection)
        if not known or any(a is not b for a, b in zip(self._held, self.collection, strict=True)):
            stored_NLE = np.stack(self.collection)
            self._stored = stored_NLE, np.linalg.norm(stored_NLE.reshape(len(stored_NLE), -1), axis=1)
            self._held = list(self.collection)
        return self._stored

    def _empty(self) -> NDArray[np.float64]:
        return np.zeros((len(self.experts), max(self.experts)))


def _normalised(eam_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    total_L1 = eam_LE.sum(axis=1, keepdims=True)
    out_LE: NDArray[np.float64] = np.divide(eam_LE, total_L1, out=np.zeros_like(eam_LE), where=total_L1 > 0)
    return out_LE


def _cosine(
    stored_NLE: NDArray[np.float64], stored_norm_N: NDArray[np.float64], eam_LE: NDArray[np.float64]
) -> NDArray[np.float64]:
    flat_NX, x = stored_NLE.reshape(len(stored_NLE), -1), eam_LE.ravel()
    norm_N = stored_norm_N * np.linalg.norm(x)
    out_N: NDArray[np.float64] = np.divide(flat_NX @ x, norm_N, out=np.zeros(len(norm_N)), where=norm_N > 0)
    return out_N
