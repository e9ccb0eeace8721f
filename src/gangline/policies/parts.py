"""From a composition to policy objects: the engine and the simulator build theirs here."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from gangline.core.cost import CostTable, Curve, straight
from gangline.core.errors import UsageError
from gangline.core.events import Need, RoutingEvent
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies.caches import CachePolicy, make_cache
from gangline.policies.caches.copies import CopiesCache
from gangline.policies.compositions import Composition, make_precision
from gangline.policies.precision import HobbitPrecision
from gangline.policies.predictors.next_gate import Gate
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.registry import make_predictor
from gangline.policies.prefetch.protocol import Prefetcher
from gangline.policies.prefetch.registry import make_prefetcher

LEARNED = ("sida", "expertflow", "pre-gate", "read-me")
"""Predictors that need a trained network."""


@dataclass(frozen=True)
class Material:
    """What parts are made of besides their names. None where it is not at hand.

    Attributes:
        geometry: the model's MoE layers.
        gates: for each layer, scores of its experts from a gate input.
        network: of a learned predictor, and ``network_kind`` its name.
        popular: experts of a calibration trace, most used first.
        events: what will be replayed, for parts that know the future.
        cost: of one expert.
    """

    geometry: MoEGeometry
    gates: Sequence[Gate] | None = None
    network: Any = None
    network_kind: str | None = None
    popular: Sequence[ExpertKey] | None = None
    events: Sequence[RoutingEvent] | None = None
    cost: CostTable | None = None


@dataclass(frozen=True)
class Parts:
    """The policy objects of one run; they keep state, so every run needs its own.

    Attributes:
        caches: one for each pool of slots.
        predictor: None if there is none.
        prefetcher: None if nothing is read ahead.
        precision: chooses how well experts are computed; None computes all of them as they are.
    """

    caches: tuple[CachePolicy, ...]
    predictor: Predictor | None
    prefetcher: Prefetcher | None
    precision: HobbitPrecision | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """What events must carry beyond counts."""
        parts = [part for part in (*self.caches, self.predictor, self.precision) if part is not None]
        return frozenset(need for part in parts for need in part.needs) - {"future"}

    @property
    def passive(self) -> bool:
        """Whether nothing has to run beside the caches, and these look at events alone."""
        alone = self.predictor is None and self.prefetcher is None and not self.needs
        return alone and not any(
            type(cache).on_request_start is not CachePolicy.on_request_start
            or type(cache).on_request_end is not CachePolicy.on_request_end
            for cache in self.caches
        )


def build_parts(
    found: Composition, material: Material, pools: Iterable[tuple[int, Collection[int]]] | int
) -> Parts:
    """Make the parts of a composition.

    Args:
        found: which ones.
        material: what they are made of.
        pools: slots and layers of each pool of slots, or the slots of a single one for all layers. Layers
            behind the model's last are those of copies in low precision.

    Raises:
        UsageError: a name or parameter is not known, or material is missing; the message says how to get it.
    """
    geometry = material.geometry
    sizes = [(pools, range(len(geometry.layers)))] if isinstance(pools, int) else list(pools)
    slots = sum(count for count, _ in sizes)
    caches = tuple(_cache(found, material, count, layers) for count, layers in sizes)
    prefetcher = None
    copies = any(min(layers) >= len(geometry.layers) for _, layers in sizes)
    precision = make_precision(found).rule if copies and found.precision is not None else None
    if found.prefetcher is not None:
        cost = material.cost or slot_cost(1, 1.0, 0.1)
        prefetcher = make_prefetcher(
            found.prefetcher,
            slots=slots,
            geometry=geometry,
            cost=cost,
            precision=precision,
            **found.prefetcher_options,
        )
    return Parts(caches, _predictor(found, material), prefetcher, precision)


def slot_cost(expert_bytes: int, expert_seconds: float, bytes_per_second: float) -> CostTable:
    """Return the costs of one tier of slots: what is in a slot computes, what is not must be moved first."""
    return CostTable(
        "slots",
        expert_bytes,
        cpu=Curve(((1, math.inf),)),
        gpu=straight(0.0, expert_seconds),
        bandwidth={"host_to_hbm": bytes_per_second},
        contended={"host_to_hbm": bytes_per_second},
    )


def _cache(found: Composition, material: Material, slots: int, layers: Collection[int]) -> CachePolicy:
    behind = len(material.geometry.layers)
    copies = min(layers) >= behind
    mine = {layer - behind for layer in layers} if copies else set(layers)
    shown = tuple(
        layer if n in mine else replace(layer, experts=0, top_k=0)
        for n, layer in enumerate(material.geometry.layers)
    )
    params = dict(found.cache_options)
    if found.cache == "static-hot":
        if material.popular is None:
            raise UsageError(
                "the static-hot cache keeps the popular experts of a trace: record one with "
                "'gangline trace' and give it with --predictor DIR (simulate: --calibrate)"
            )
        # Some slots stay free, so that the other experts have something to pass through.
        passing = min(max(layer.top_k for layer in shown), slots // 2)
        params["hot"] = [key for key in material.popular if key.layer in mine][: slots - max(1, passing)]
    cache = make_cache(
        found.cache,
        slots=slots,
        geometry=MoEGeometry(shown),
        scope=cast(Literal["layer", "global"], found.scope),
        events=material.events,
        **params,
    )
    return CopiesCache(cache, behind) if copies else cache


def _predictor(found: Composition, material: Material) -> Predictor | None:
    name = found.predictor
    if name == "none":
        return None
    params = dict(found.predictor_options)
    if found.ahead is not None and name != "pre-gate":
        params.setdefault("ahead", found.ahead)
    if name == "oracle":
        if material.events is None:
            raise UsageError(
                "the oracle knows the future, as only a simulation does; choose another predictor"
            )
        params["events"] = material.events
    elif name == "next-gate":
        if material.gates is None:
            raise UsageError(
                "the next-gate predictor needs the model's routers; let 'gangline tune MODEL --trace DIR' "
                "simulate it"
            )
        params["gates"] = material.gates
    elif name == "token-id" and material.network_kind == name:
        params["network"] = material.network
    elif name in LEARNED:
        if material.network is None or material.network_kind != name:
            got = f", not of {material.network_kind}" if material.network_kind else ""
            raise UsageError(
                f"the {name} predictor needs a trained network{got}: train one with 'gangline predict train' "
                "and give it with --predictor FILE"
            )
        params["network"] = material.network
    return make_predictor(name, geometry=material.geometry, **params)
