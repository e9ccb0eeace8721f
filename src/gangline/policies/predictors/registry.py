"""Predictors by name: ``make_predictor("trace-matching", geometry=geometry, capacity=500)``.

Learned predictors (``sida``, ``expertflow``, ``pre-gate``, ``read-me``) take their trained ``network``,
``token-id`` may; their modules are imported only when asked for, because they need torch.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.geometry import MoEGeometry
from gangline.policies.predictors.baselines import LastToken, Popularity
from gangline.policies.predictors.next_gate import Gate, NextGate
from gangline.policies.predictors.oracle import Oracle
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.token_statistics import TokenStatistics
from gangline.policies.predictors.trace_matching import TraceMatching


def _experts(geometry: MoEGeometry) -> list[int]:
    return [layer.experts for layer in geometry.layers]


def _top_k(geometry: MoEGeometry) -> int:
    return max(layer.top_k for layer in geometry.layers)


def _oracle(g: MoEGeometry, events: Sequence[RoutingEvent], ahead: int | None = 1) -> Predictor:
    return Oracle(events, ahead)


def _next_gate(
    g: MoEGeometry,
    gates: Sequence[Gate],
    ahead: int = 1,
    most_tokens: int | None = None,
    least_precision: float | None = None,
) -> Predictor:
    return NextGate(gates, ahead, _top_k(g), most_tokens, least_precision)


def _sida(g: MoEGeometry, network: Any) -> Predictor:
    from gangline.policies.predictors.sida import SidaPredictor

    return SidaPredictor(network, _top_k(g))


def _expertflow(g: MoEGeometry, network: Any) -> Predictor:
    from gangline.policies.predictors.expertflow import ExpertFlowPredictor

    return ExpertFlowPredictor(network)


def _pre_gate(g: MoEGeometry, network: Any) -> Predictor:
    from gangline.policies.predictors.pregate import PreGatePredictor

    return PreGatePredictor(network, _top_k(g))


def _read_me(g: MoEGeometry, network: Any) -> Predictor:
    from gangline.policies.predictors.read_me import DecoupledRouterPredictor

    return DecoupledRouterPredictor(network, _top_k(g))


def _token_id(g: MoEGeometry, prior: float = 1.0, network: Any = None) -> Predictor:
    if network is None:
        return TokenStatistics(_experts(g), prior)
    found: Predictor = network.statistics()
    return found


PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "none": lambda g: Silent(),
    "last-token": lambda g, ahead=1: LastToken(len(g.layers), ahead),
    "popularity": lambda g, ahead=1: Popularity(_experts(g), ahead),
    "token-id": _token_id,
    "trace-matching": lambda g, capacity=120, neighbours=1: TraceMatching(_experts(g), capacity, neighbours),
    "next-gate": _next_gate,
    "oracle": _oracle,
    "sida": _sida,
    "expertflow": _expertflow,
    "pre-gate": _pre_gate,
    "read-me": _read_me,
}
"""Predictor names and how to build each; parameters after the geometry are the predictor's own."""


class Silent(Predictor):
    """Forecasts nothing."""


def make_predictor(name: str, *, geometry: MoEGeometry, **params: Any) -> Predictor:
    """Build a predictor by name.

    Raises:
        UsageError: the name or a parameter is not known, or one is missing.
    """
    if name not in PREDICTORS:
        raise UsageError(f"no predictor is called {name!r}; choose one of {', '.join(sorted(PREDICTORS))}")
    known = dict(list(inspect.signature(PREDICTORS[name]).parameters.items())[1:])
    listed = ", ".join(known) or "none"
    if unknown := sorted(set(params).difference(known)):
        raise UsageError(f"the {name} predictor has no parameter {unknown[0]!r}; it has {listed}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in params]
    if missing:
        raise UsageError(f"the {name} predictor needs {missing[0]}=; its parameters are {listed}")
    return PREDICTORS[name](geometry, **params)
