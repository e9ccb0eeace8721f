"""Names lead to parts that exist, and exactness is the parts' own."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gangline.core.errors import UsageError
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.keys import ExpertKey, low_copy
from gangline.policies import batching, precision, prefetch, schedule
from gangline.policies.caches import CACHES
from gangline.policies.compositions import COMPOSITIONS, composition, make_precision, read_composition
from gangline.policies.parts import Material, build_parts
from gangline.policies.predictors import PREDICTORS, make_predictor
from gangline.policies.predictors.pregate import PreGates
from policy_replay import random_events

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


def test_a_file_may_set_the_second_precision():
    found = read("like: hobbit\nprecision: {name: HobbitPrecision, high: 0.4, bits: int3, share: 0.1}\n")
    mixed = make_precision(found)
    assert (mixed.rule.high, mixed.rule.low, mixed.bits, mixed.share) == (0.4, 0.9, "int3", 0.1)
    assert not found.exact and read("like: hobbit\nprecision:\n").exact
    assert read("like: hobbit\nprecision: {name: HobbitPrecision, high: 1, low: 1}\n").exact
    parts = build_parts(found, Material(GEOMETRY, [lambda x: x] * 3), [(9, range(3)), (4, range(3, 6))])
    assert parts.precision.high == 0.4 and parts.prefetcher.precision is parts.precision
    assert {"ids", "weights"} <= parts.needs
    assert (
        build_parts(found, Material(GEOMETRY, [lambda x: x] * 3), 9).precision is None
    )  # no slots for copies
    for text, says in (
        ("Rounding", "no precision rule"),
        ("{name: HobbitPrecision, higher: 1}", "no parameter 'higher'"),
        ("{name: HobbitPrecision, share: 1}", "between 0 and 1"),
        ("{name: HobbitPrecision, bits: 2}", "must be the name of a precision"),
        ("{name: HobbitPrecision, high: 2, low: 1}", "T1 <= T2"),
    ):
        with pytest.raises(UsageError, match=says):
            read(f"like: hobbit\nprecision: {text}\n")


@pytest.mark.parametrize("cache", ["lru", "layer-lru", "hobbit", "lfru", "arc"])
def test_a_cache_of_copies_does_what_one_of_experts_does(cache, seed):
    """The same events, hits, admissions and victims, three layers behind."""
    found = replace(composition("hobbit"), cache=cache, scope="layer" if cache == "layer-lru" else "global")
    material = Material(GEOMETRY, [lambda x: x] * 3)
    own, copies = build_parts(found, material, [(5, range(3)), (5, range(3, 6))]).caches
    held: set[ExpertKey] = set()
    for event in random_events(seed, layers=3):
        hits = tuple(e for e in event.experts if ExpertKey(event.layer, e) in held)
        leased = {ExpertKey(event.layer, expert) for expert in event.experts}
        own.on_event(event, hits)
        copies.on_event(replace(event, layer=event.layer + 3), hits)
        for key in sorted(leased - held):
            if len(held) == 5:
                victim = own.victim(event.layer, lambda k, leased=leased: k not in leased)
                same = copies.victim(event.layer + 3, lambda k, leased=leased: (k[0] - 3, k[1]) not in leased)
                assert victim is not None and same == low_copy(victim, 3)
                held.remove(victim)
                own.evicted(victim)
                copies.evicted(same)
            held.add(key)
            own.admitted(key)
            copies.admitted(low_copy(key, 3))


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_needs_are_known_before_anything_runs(name):
    """Whoever looks at more than counts says so; whoever listens to sequences is not passive."""
    found = COMPOSITIONS[name]
    popular = [ExpertKey(layer, 0) for layer in range(3)]
    material = Material(GEOMETRY, [lambda x: x] * 3, object(), found.predictor, popular)
    if found.predictor == "pre-gate":
        material = replace(material, network=PreGates([torch.randn(8, 4)] * 3))
    parts = build_parts(found, material, 12)
    assert parts.passive == (
        name in {"layer-lru", "fiddler", "freetoken", "towards-moe-deployment", "se-moe"}
    )
    assert ("scores" in parts.needs) == (name == "hybrimoe")
    assert ("gate_input" in parts.needs) == (found.predictor in ("next-gate", "pre-gate"))
    assert ("embeddings" in parts.needs) == (name == "sida")
