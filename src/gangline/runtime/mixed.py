"""Events some of whose experts are computed in low precision, or not at all.

Every expert has a copy in low precision on disk. Both have slots of their own; a copy is named like an expert
of a further layer behind the model's last (:func:`gangline.core.keys.low_copy`), so that the store, its
leases and its reads know nothing of precisions.

Shape suffixes: T tokens, K chosen experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey, low_copy
from gangline.core.layout import ExpertCatalog
from gangline.core.precision import Precision
from gangline.kernels.grouping import Grouping
from gangline.policies.precision import HobbitPrecision
from gangline.runtime.store import ExpertStore


@dataclass(frozen=True)
class Part:
    """The experts of an event that are computed in one precision.

    Attributes:
        event: of these experts; its layer names their slots and kernels.
        grouping: their pairs.
        whole: the event of all experts as the caches see it; None if this is all of it.
        chosen: how each expert of ``whole`` is computed.
    """

    event: RoutingEvent
    grouping: Grouping
    whole: RoutingEvent | None = None
    chosen: Mapping[int, Precision] | None = None


class MixedPrecision:
    """Divides events by a rule.

    Args:
        store: of both precisions.
        rule: chooses; it needs ids and weights with the events.
        layers: MoE layers of the model.
    """

    def __init__(self, store: ExpertStore, rule: HobbitPrecision, layers: int) -> None:
        self._store, self._rule, self._layers = store, rule, layers

    def divide(self, event: RoutingEvent, grouping: Grouping) -> tuple[Grouping, list[Part]]:
        """Return the pairs that are computed, and the parts: high precision, then low.

        Both parts are always there, if empty: the cache of each precision hears of every event.
        """
        chosen = self._rule.choose(event, self._resident(event))
        low = [n for n, expert in enumerate(event.experts) if chosen[expert] is Precision.LOW]
        high = [n for n, expert in enumerate(event.experts) if chosen[expert] is Precision.HIGH]
        used = sorted(high + low)
        self._store.stats.skipped += len(event.experts) - len(used)
        if self._rule.renormalise and len(used) < len(event.experts):
            grouping = self._renormalised(event, grouping, chosen)
        parts = [self._part(event, grouping, high, 0, chosen), self._part(event, grouping, low, 1, chosen)]
        return grouping.only(used), parts

    def _resident(self, event: RoutingEvent) -> dict[int, Precision]:
        """Return the best copy of each expert of an event that has a slot."""
        found = {}
        for expert in event.experts:
            key = ExpertKey(event.layer, expert)
            if self._store.holds(key):
                found[expert] = Precision.HIGH
            elif self._store.holds(low_copy(key, self._layers)):
                found[expert] = Precision.LOW
        return found

    def _part(
        self,
        event: RoutingEvent,
        grouping: Grouping,
        indices: list[int],
        behind: int,
        chosen: Mapping[int, Precision],
    ) -> Part:
        layer = event.layer + behind * self._layers
        part = replace(
            event,
            layer=layer,
            experts=tuple(event.experts[n] for n in indices),
            counts=tuple(event.counts[n] for n in indices),
        )
        return Part(part, grouping.only(indices), replace(event, layer=layer), chosen)

    def _renormalised(
        self, event: RoutingEvent, grouping: Grouping, chosen: Mapping[int, Precision]
    ) -> Grouping:
        """Let the weights of each token that lost an expert sum to what they were."""
        detail = event.detail
        assert detail is not None and detail.ids_TK is not None and detail.weights_TK is not None
        skipped = [expert for expert, how in chosen.items() if how is Precision.SKIP]
        weights_TK = detail.weights_TK.astype(np.float32)
        left_T = (weights_TK * ~np.isin(detail.ids_TK, skipped)).sum(1)
        factors_T = np.divide(weights_TK.sum(1), left_T, out=np.ones_like(left_T), where=left_T > 0)
        factors_P1 = torch.from_numpy(factors_T)[grouping.token_P].unsqueeze(-1)
        return replace(grouping, weight_P1=grouping.weight_P1 * factors_P1)


def with_copies(high: ExpertCatalog, low: ExpertCatalog) -> ExpertCatalog:
    """Return one catalog of the experts and, as further layers, their copies in low precision."""
    layers, files = len(high.layouts), len(high.files)
    extents = dict(high.extents)
    for key, found in low.extents.items():
        moved = tuple(replace(extent, file=extent.file + files) for extent in found)
        extents[low_copy(key, layers)] = moved
    sums = dict(high.checksums or {})
    sums |= {low_copy(key, layers): crc for key, crc in (low.checksums or {}).items()}
    return ExpertCatalog(high.files + low.files, high.layouts + low.layouts, extents, sums or None)
