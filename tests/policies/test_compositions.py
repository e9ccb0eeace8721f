"""Names lead to parts that exist, and exactness is the parts' own."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gangline.core.errors import UsageError
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies import batching, precision, prefetch, schedule
from gangline.policies.caches import CACHES
from gangline.policies.compositions import COMPOSITIONS, composition, read_composition
from gangline.policies.parts import Material, build_parts
from gangline.policies.predictors import PREDICTORS, make_predictor
from gangline.policies.predictors.pregate import PreGates

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


def test_the_page_names_every_part():
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in set(PREDICTORS) - {"none", "oracle"})
    assert "generated/policies.md" in text  # the table of compositions follows from the code
    yaml = text.split("```yaml\n")[1].split("```")[0]
    assert composition("hobbit-exact").cache != "lfru"
    found = read(yaml)
    assert (found.cache, dict(found.cache_options)) == ("lfru", {"privileged": 0.3})
    assert (found.predictor, found.ahead, found.prefetcher) == ("next-gate", 2, "FatePrefetch")
    gates = [lambda x: x] * 3
    parts = build_parts(found, Material(GEOMETRY, gates), 12)
    assert parts.predictor.ahead == 2 and parts.prefetcher.closeness == 0.7 and not parts.passive


def read(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(text)
        return read_composition(path)


def test_parts_can_be_switched_off():
    found = read("like: hobbit-exact\npredictor: none\nprefetcher:\ncache: lru\nscope: global\n")
    assert (found.predictor, found.prefetcher, found.scope) == ("none", None, "global")
    assert build_parts(found, Material(GEOMETRY), [(4, [0, 2]), (3, [1])]).passive


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_needs_are_known_before_anything_runs(name):
    """Whoever looks at more than counts says so; whoever listens to sequences is not passive."""
    found = COMPOSITIONS[name]
    popular = [ExpertKey(layer, 0) for layer in range(3)]
    material = Material(GEOMETRY, [lambda x: x] * 3, object(), found.predictor, popular)
    if found.predictor == "pre-gate":
        material = replace(material, network=PreGates([torch.randn(8, 4)] * 3))
    parts = build_parts(found, material, 12)
    assert parts.passive == (name in {"default", "fiddler", "freetoken", "towards-moe-deployment", "se-moe"})
    assert ("scores" in parts.needs) == (name == "hybrimoe")
    assert ("gate_input" in parts.needs) == (found.predictor in ("next-gate", "pre-gate"))
    assert ("embeddings" in parts.needs) == (name == "sida")
