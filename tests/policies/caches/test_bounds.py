"""Every cache against the shared vectors, the clairvoyant bounds and the laws that any cache obeys."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies.caches import CACHES, make_cache
from gangline.policies.caches.belady import Belady
from gangline.policies.caches.lru import LRU
from gangline.policies.caches.window_oracle import WindowOracle
from policy_replay import event, random_events, replay, steady

CAUSAL = sorted(set(CACHES) - {"belady", "belady-bypass", "window-oracle"})


def geometry(layers, experts, top_k):
    return MoEGeometry((LayerGeometry(experts, top_k, 8, 8),) * layers)


def with_scores(events, experts):
    """The same events with scores that favour the chosen experts."""
    import numpy as np

    rng = np.random.default_rng(len(events))
    out = []
    for e in events:
        scores_TE = rng.random((1, experts)) / experts
        scores_TE[0, list(e.experts)] += 1
        out.append(
            RoutingEvent(e.step, e.layer, e.phase, 1, e.experts, e.counts, RoutingDetail(scores_TE=scores_TE))
        )
    return out


def build(name, slots, layers, experts, top_k, events, **more):
    if name == "static-hot":
        more["hot"] = [ExpertKey(layer, 0) for layer in range(layers)]
    return make_cache(name, slots=slots, geometry=geometry(layers, experts, top_k), events=events, **more)


def test_flooding_vectors():
    """L=4, k=2, the same experts every token, 50 tokens, 400 accesses."""
    events = steady(4, (0, 1), 50)
    assert replay(LRU(), 6, events) == 0
    assert replay(LRU(), 8, events) == 392
    assert replay(Belady(events), 6, events) == 262
    assert replay(Belady(events, bypass=True), 6, events) == 294
    assert replay(LRU([2] * 4), 8, events) == 392
    assert replay(LRU([1] * 4), 4, events) == 196


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 1))
def test_capacity_k_leaves_no_choice(seed, top_k, sticky):
    """With k slots for one layer every policy hits exactly what adjacent events share."""
    events = with_scores(random_events(seed, layers=1, experts=6, top_k=top_k, sticky=sticky), 6)
    shared = sum(len(set(a.experts) & set(b.experts)) for a, b in itertools.pairwise(events))
    for name in set(CACHES) - {"belady-bypass", "static-hot", "layer-lru"}:
        assert replay(build(name, top_k, 1, 6, top_k, events, quotas=[top_k]), top_k, events) == shared, name


@pytest.mark.parametrize("scope", ["layer", "global"])
@given(seed=st.integers(0, 10**6), slots=st.integers(2, 18), sticky=st.floats(0, 1))
def test_belady_bounds_every_cache(scope, seed, slots, sticky):
    events = with_scores(random_events(seed, layers=2, experts=8, top_k=2, steps=40, sticky=sticky), 8)
    bypass = replay(Belady(events, bypass=True), slots, events)
    assert bypass >= replay(Belady(events), slots, events)
    for name in CAUSAL:
        hits = replay(build(name, slots, 2, 8, 2, events, scope=scope), slots, events)
        assert hits <= bypass, name


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 1))
def test_belady_with_one_pool_beats_belady_per_layer(seed, per_layer, sticky):
    events = random_events(seed, layers=3, experts=8, top_k=2, steps=40, sticky=sticky)
    slots = 3 * per_layer
    alone = replay(Belady(events, [per_layer] * 3), slots, events)
    assert replay(Belady(events), slots, events) >= alone
    assert alone >= replay(LRU([per_layer] * 3), slots, events)


@given(st.integers(0, 10**6), st.integers(4, 20), st.floats(0, 1))
def test_lru_and_belady_are_stack_algorithms(seed, slots, sticky):
    events = random_events(seed, layers=2, experts=10, top_k=2, steps=40, sticky=sticky)
    assert replay(LRU(), slots + 1, events) >= replay(LRU(), slots, events)
    assert replay(Belady(events), slots + 1, events) >= replay(Belady(events), slots, events)


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_window_oracle_never_beats_belady(seed, slots):
    events = random_events(seed, layers=2, experts=8, top_k=2, steps=40)
    window = replay(WindowOracle(events, window=8), slots, events)
    assert window <= replay(Belady(events, bypass=True), slots, events)


def test_window_oracle_keeps_what_the_window_uses_most():
    events = [event(0, ids, step) for step, ids in enumerate([(0,), (1,), (2,), (0,), (0,), (1,)])]
    policy = WindowOracle(events, window=3)
    for step in range(3):
        policy.on_event(events[step], ())
        if step < 2:
            policy.admitted(ExpertKey(0, step))
    assert policy.victim(0, lambda key: True) == ExpertKey(0, 1)


def test_belady_refuses_another_future():
    events = steady(2, (0, 1), 3)
    policy = Belady(events)
    policy.on_event(events[0], ())
    with pytest.raises(UsageError, match="layer 0 of step 1 is not event 1"):
        policy.on_event(events[2], ())


@pytest.mark.parametrize("name", sorted(CACHES))
def test_all_experts_fit(name):
    """With a slot for every expert each one is read once."""
    events = with_scores(random_events(7, layers=2, experts=6, top_k=2, steps=80, sticky=0.2), 6)
    distinct = len({(e.layer, x) for e in events for x in e.experts})
    policy = build(name, 12, 2, 6, 2, events)
    assert replay(policy, 12, events) == 2 * len(events) - distinct


@pytest.mark.parametrize("name", sorted(CACHES))
def test_victim_waits_when_everything_is_leased(name):
    events = with_scores(steady(1, (0, 1), 3), 4)
    policy = build(name, 2, 1, 4, 2, events)
    policy.on_event(events[0], ())
    policy.admitted(ExpertKey(0, 0))
    policy.admitted(ExpertKey(0, 1))
    assert policy.victim(0, lambda key: False) is None


@pytest.mark.parametrize("name", CAUSAL)
def test_prefetched_keys_and_forecasts_are_taken(name):
    """A key that no event asked for may come in; forecasts of any kind do no harm."""
    events = with_scores(random_events(3, layers=2, experts=6, steps=10), 6)
    policy = build(name, 4, 2, 6, 2, events)
    policy.on_request_start()
    policy.admitted(ExpertKey(1, 5))
    policy.on_forecast([Forecast(0, 1, (5, 3), (0.7, 0.1), 1, "test"), Forecast(4, 0, (), (), 9, "test")])
    policy.on_event(events[0], ())
    policy.admitted(ExpertKey(0, events[0].experts[0]))
    policy.on_request_end()
    victim = policy.victim(0, lambda key: True)
    assert victim in {None, ExpertKey(1, 5), ExpertKey(0, events[0].experts[0])}


def test_names_and_parameters_are_checked():
    with pytest.raises(UsageError, match=r"no cache is called 'lruu'.*layer-lru"):
        make_cache("lruu", slots=4, geometry=geometry(1, 4, 1))
    with pytest.raises(
        UsageError, match="the lfru cache has no parameter 'share'; it has privileged, window"
    ):
        make_cache("lfru", slots=4, geometry=geometry(1, 4, 1), share=1)
    with pytest.raises(UsageError, match="needs events="):
        make_cache("belady", slots=4, geometry=geometry(1, 4, 1))
