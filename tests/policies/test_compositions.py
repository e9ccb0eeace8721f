"""Names lead to parts that exist, and exactness is the parts' own."""

import pytest

from gangline.core.errors import UsageError
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.policies import batching, precision, prefetch, schedule
from gangline.policies.caches import CACHES
from gangline.policies.compositions import COMPOSITIONS, composition
from gangline.policies.predictors import PREDICTORS, make_predictor

GEOMETRY = MoEGeometry((LayerGeometry(8, 2, 4, 4),) * 3)


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_every_part_exists(name):
    c = composition(name)
    assert c.cache in CACHES and c.predictor in PREDICTORS and c.scope in ("layer", "global")
    for folder, part in (
        (prefetch, c.prefetcher),
        (precision, c.precision),
        (schedule, c.scheduler),
        (batching, c.batching),
    ):
        assert part is None or part in folder.__all__
    assert c.exact == (c.precision is None)


def test_predictors_by_name():
    assert make_predictor("none", geometry=GEOMETRY).end_step(0) == []
    assert make_predictor("trace-matching", geometry=GEOMETRY, capacity=7).capacity == 7
    assert make_predictor("oracle", geometry=GEOMETRY, events=[], ahead=None).ahead is None
    with pytest.raises(UsageError, match="no predictor is called 'orakel'"):
        make_predictor("orakel", geometry=GEOMETRY)
    with pytest.raises(UsageError, match="has no parameter 'size'; it has ahead"):
        make_predictor("last-token", geometry=GEOMETRY, size=1)
    with pytest.raises(UsageError, match="the sida predictor needs network="):
        make_predictor("sida", geometry=GEOMETRY)
    with pytest.raises(UsageError, match="no composition is called 'x'"):
        composition("x")


def test_learned_predictors_by_name(seed):
    import torch

    from gangline.policies.predictors.expertflow import RoutingPathPredictor
    from gangline.policies.predictors.pregate import PreGates
    from gangline.policies.predictors.read_me import DecoupledRouter
    from gangline.policies.predictors.sida import HashFunction

    networks = {
        "sida": HashFunction(4, [8] * 3, 8),
        "expertflow": RoutingPathPredictor(10, 3, 8, feed_forward=16, depth=1),
        "read-me": DecoupledRouter(10, 3, 8, hidden=16),
        "pre-gate": PreGates([torch.randn(8, 4)] * 3),
    }
    for name, network in networks.items():
        predictor = make_predictor(name, geometry=GEOMETRY, network=network)
        forecasts = predictor.on_request(0, [1, 2], torch.randn(2, 4))
        assert len(forecasts) == (0 if name == "pre-gate" else 3)
        assert predictor.exact
