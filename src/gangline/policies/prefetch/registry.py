"""Prefetch planners by the name of their class."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gangline.core.cost import CostTable
from gangline.core.errors import UsageError
from gangline.core.geometry import MoEGeometry
from gangline.policies.precision.hobbit import HobbitPrecision
from gangline.policies.prefetch.all_later import AllLater
from gangline.policies.prefetch.by_gain import ByGain
from gangline.policies.prefetch.fate import FatePrefetch
from gangline.policies.prefetch.first_missing import FirstMissing
from gangline.policies.prefetch.plec import Plec
from gangline.policies.prefetch.protocol import Prefetcher
from gangline.policies.prefetch.whole_set import WholeSet


@dataclass(frozen=True)
class PrefetchSetting:
    """What every planner may be built from."""

    slots: int
    geometry: MoEGeometry
    cost: CostTable
    precision: HobbitPrecision | None = None

    @property
    def top_k(self) -> int:
        """Experts per token, the most of all layers."""
        return max(layer.top_k for layer in self.geometry.layers)


def _fate(s: PrefetchSetting, closeness: float = 0.5) -> Prefetcher:
    return FatePrefetch(s.top_k, closeness)


PREFETCHERS: dict[str, Callable[..., Prefetcher]] = {
    "AllLater": lambda s: AllLater(len(s.geometry.layers)),
    "ByGain": lambda s: ByGain(s.cost, s.top_k),
    "FatePrefetch": _fate,
    "FirstMissing": lambda s: FirstMissing(s.top_k, s.precision, len(s.geometry.layers)),
    "Plec": lambda s, threshold=0.5: Plec(max(1, s.slots // 2), threshold),
    "WholeSet": lambda s: WholeSet(),
}
"""Names and how to build each; parameters after the setting are the planner's own."""


def make_prefetcher(
    name: str,
    *,
    slots: int,
    geometry: MoEGeometry,
    cost: CostTable,
    precision: HobbitPrecision | None = None,
    **params: Any,
) -> Prefetcher:
    """Build a planner by name.

    Args:
        name: a key of ``PREFETCHERS``.
        slots: expert slots in all.
        geometry: the model's MoE layers.
        cost: of one expert, for planners that weigh time.
        precision: the rule of two precisions, where experts have copies in low precision.
        params: the planner's own parameters.

    Raises:
        UsageError: the name or a parameter is not known.
    """
    if name not in PREFETCHERS:
        raise UsageError(f"no prefetcher is called {name!r}; choose one of {', '.join(sorted(PREFETCHERS))}")
    known = list(inspect.signature(PREFETCHERS[name]).parameters)[1:]
    if unknown := sorted(set(params).difference(known)):
        raise UsageError(
            f"the {name} prefetcher has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    return PREFETCHERS[name](PrefetchSetting(slots, geometry, cost, precision), **params)
