"""Caches by name: ``make_cache("lfru", slots=64, geometry=geometry, privileged=0.3)``."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies.caches.aged_lfu import AgedLFU
from gangline.policies.caches.arc import ARC
from gangline.policies.caches.belady import Belady
from gangline.policies.caches.buffering import ExpertBuffering
from gangline.policies.caches.fate import FateCache
from gangline.policies.caches.fifo import FIFO
from gangline.policies.caches.hobbit import HobbitCache
from gangline.policies.caches.layer_lru import LayerLRU
from gangline.policies.caches.lfru import LFRU
from gangline.policies.caches.lfu import LFU
from gangline.policies.caches.lookahead_belady import LookaheadBelady
from gangline.policies.caches.lru import LRU
from gangline.policies.caches.moe_infinity import MoEInfinityCache
from gangline.policies.caches.mrs import MRS
from gangline.policies.caches.phased import PhasedCache
from gangline.policies.caches.protocol import CachePolicy
from gangline.policies.caches.quotas import layer_quotas
from gangline.policies.caches.random_eviction import RandomEviction
from gangline.policies.caches.sida_residency import SidaResidency
from gangline.policies.caches.static_hot import StaticHot
from gangline.policies.caches.window_oracle import WindowOracle


@dataclass(frozen=True)
class CacheSetting:
    """What every cache may be built from."""

    slots: int
    experts: list[int]
    top_k: list[int]
    quotas: list[int] | None
    events: Sequence[RoutingEvent] | None

    def future(self) -> Sequence[RoutingEvent]:
        """Return the events, which only some caches need."""
        if self.events is None:
            raise UsageError("a cache that knows the future needs events=; it works in the simulator only")
        return self.events


def _hot(s: CacheSetting, hot: Iterable[ExpertKey]) -> CachePolicy:
    return StaticHot(hot)


def _mrs(s: CacheSetting, alpha: float = 0.5, top_p: int | None = None) -> CachePolicy:
    kept = [min(e, top_p or 2 * k) for e, k in zip(s.experts, s.top_k, strict=True)]
    return MRS(s.experts, kept, alpha, s.quotas)


CACHES: dict[str, Callable[..., CachePolicy]] = {
    "layer-lru": lambda s: LayerLRU(s.slots, s.top_k, s.experts),
    "lru": lambda s: LRU(s.quotas),
    "lfu": lambda s, in_cache=False, per_request=False: LFU(
        s.quotas, in_cache=in_cache, per_request=per_request
    ),
    "lfru": lambda s, privileged=0.5, window=256: LFRU(s.quotas, privileged=privileged, window=window),
    "fifo": lambda s: FIFO(s.quotas),
    "lifo": lambda s: FIFO(s.quotas, newest_first=True),
    "arc": lambda s: ARC(s.slots, s.quotas),
    "random": lambda s, seed=0: RandomEviction(seed),
    "static-hot": _hot,
    "hobbit": lambda s, weights=(0.25, 0.25, 0.25, 0.25): HobbitCache(s.experts, weights, s.quotas),
    "aged-lfu": lambda s, age=0.97, nearness=2.0: AgedLFU(s.experts, age, nearness, s.quotas),
    "phased": lambda s, age=0.97, nearness=2.0: PhasedCache(s.slots, s.top_k, s.experts, age, nearness),
    "mrs": _mrs,
    "moe-infinity": lambda s, eps=1e-4: MoEInfinityCache(s.experts, s.quotas, eps=eps),
    "fate": lambda s, shallow=3: FateCache(s.slots, s.top_k, s.experts, shallow),
    "buffering": lambda s: ExpertBuffering(s.quotas),
    "sida": lambda s: SidaResidency(s.quotas),
    "read-me": lambda s, threshold=0.0: LookaheadBelady(s.quotas, threshold=threshold),
    "belady": lambda s: Belady(s.future(), s.quotas),
    "belady-bypass": lambda s: Belady(s.future(), s.quotas, bypass=True),
    "window-oracle": lambda s, window=16: WindowOracle(s.future(), s.quotas, window=window),
}
"""Cache names and how to build each; parameters after the setting are the cache's own."""


def make_cache(
    name: str,
    *,
    slots: int,
    geometry: MoEGeometry,
    scope: Literal["layer", "global"] = "layer",
    quotas: Sequence[int] | None = None,
    events: Sequence[RoutingEvent] | None = None,
    **params: Any,
) -> CachePolicy:
    """Build a cache policy by name.

    Args:
        name: a key of ``CACHES``.
        slots: expert slots in all.
        geometry: the model's MoE layers.
        scope: ``layer`` partitions the slots (:func:`layer_quotas` unless ``quotas`` is given), ``global``
            makes one pool. ``layer-lru`` and ``fate`` always partition, ``random`` and ``static-hot`` never.
        quotas: slots for each layer.
        events: the events that will be replayed, for caches that know the future.
        params: the cache's own parameters.

    Raises:
        UsageError: the name or a parameter is not known, or ``events`` is missing.
    """
    if name not in CACHES:
        raise UsageError(f"no cache is called {name!r}; choose one of {', '.join(sorted(CACHES))}")
    known = list(inspect.signature(CACHES[name]).parameters)[1:]
    if unknown := sorted(set(params).difference(known)):
        raise UsageError(
            f"the {name} cache has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    experts = [layer.experts for layer in geometry.layers]
    top_k = [layer.top_k for layer in geometry.layers]
    if scope == "layer" and quotas is None:
        quotas = layer_quotas(slots, top_k, experts)
    setting = CacheSetting(
        slots, experts, top_k, list(quotas) if quotas is not None and scope == "layer" else None, events
    )
    return CACHES[name](setting, **params)
