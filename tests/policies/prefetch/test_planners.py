"""Prefetch planners: the vectors of their cards, and no planner asks for what is there or for too much."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.cost import CostTable, straight
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey, low_copy
from gangline.core.precision import Precision
from gangline.core.tiers import Priority
from gangline.policies.precision import HobbitPrecision
from gangline.policies.predictors.oracle import Oracle
from gangline.policies.prefetch import (
    AdaptiveHorizon,
    AllLater,
    ByGain,
    FatePrefetch,
    FirstMissing,
    Plec,
    WholeSet,
    correction,
    overlap_budget,
    share_slots,
)
from gangline.policies.schedule.hybrimoe import two_ended
from policy_replay import event, random_events

COST = CostTable("t", 10, straight(0.5, 1.0), straight(0.2, 0.05), bandwidth={"host_to_hbm": 20.0})


def ahead(horizon, **p):
    """A forecast for layer ``horizon`` from ``e3=0.5`` style probabilities, likeliest first."""
    return Forecast(
        0, horizon, tuple(int(name[1:]) for name in p), tuple(p.values()), horizon=horizon, source="t"
    )


def nothing(key):
    return False


PLANNERS = {
    "all-later": AllLater(4),
    "fate": FatePrefetch(2),
    "first-missing": FirstMissing(2),
    "hobbit": FirstMissing(2, HobbitPrecision()),
    "by-gain": ByGain(COST, 2),
    "whole-set": WholeSet(),
    "plec": Plec(5, 0.1),
}


@pytest.mark.parametrize("name", sorted(PLANNERS))
@given(data=st.data())
def test_every_planner_respects_residents_and_budget(name, data):
    forecasts = []
    for horizon in range(1, data.draw(st.integers(1, 3)) + 1):
        experts = data.draw(st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=5))
        p = sorted((data.draw(st.floats(0.01, 1)) for _ in experts), reverse=True)
        forecasts.append(Forecast(0, horizon, tuple(experts), tuple(p), horizon, "t"))
    held = data.draw(st.sets(st.builds(ExpertKey, st.integers(1, 3), st.integers(0, 7))))
    budget = data.draw(st.none() | st.integers(0, 4))
    fetches = PLANNERS[name].plan(forecasts, held.__contains__, budget)
    keys = [fetch.key for fetch in fetches]
    assert len(set(keys)) == len(keys)
    assert not held.intersection(keys)
    assert budget is None or len(keys) <= budget
    assert set(keys) <= {ExpertKey(f.layer, e) for f in forecasts for e in f.experts}


def test_all_later_prefers_nearer_layers():
    plan = AllLater(4).plan([ahead(3, e0=1.0), ahead(1, e5=0.6, e6=0.4)], nothing)
    assert [(f.key, pytest.approx(f.score)) for f in plan] == [
        (ExpertKey(1, 5), 0.6 * 0.75),
        (ExpertKey(1, 6), 0.4 * 0.75),
        (ExpertKey(3, 0), 0.25),
    ]
    assert AllLater(4).plan([ahead(4, e0=1.0)], nothing) == [], "that is the next pass"


def test_fate_widens_beyond_the_top_k():
    forecasts = [ahead(1, e0=0.4, e1=0.3, e2=0.2, e3=0.1)]
    assert [f.key.expert for f in FatePrefetch(2, 0.5).plan(forecasts, nothing)] == [0, 1, 2]
    assert [f.key.expert for f in FatePrefetch(2, 0.5).plan(forecasts, nothing, 1)] == [0]
    assert FatePrefetch(2).plan(forecasts, nothing, 0) == []
    assert (overlap_budget(10e-3, 3e-3), overlap_budget(1e-3, 3e-3)) == (3, 0)


def test_first_missing_looks_one_layer_further():
    forecasts = [ahead(1, e0=0.6, e1=0.4), ahead(2, e4=0.9, e5=0.1), ahead(3, e6=1.0)]
    held = {ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(2, 4)}
    assert [f.key for f in FirstMissing(2).plan(forecasts, held.__contains__)] == [ExpertKey(2, 5)]
    assert ExpertKey(1, 1) in FirstMissing(2).protected(forecasts)
    low = FirstMissing(2, HobbitPrecision(0.5, 0.95))
    assert not low.exact
    assert [f.precision for f in low.plan(forecasts[1:], nothing)] == [Precision.HIGH, Precision.LOW]


def test_either_copy_will_do_where_low_precision_is_wanted():
    """Copies are named like experts of layers behind the last; here of a model of 4 layers."""
    planner, forecasts = FirstMissing(2, HobbitPrecision(0.5, 0.95), 4), [ahead(2, e4=0.9, e5=0.1)]
    for held, left in (
        (set(), [(4, Precision.HIGH), (5, Precision.LOW)]),
        ({low_copy(ExpertKey(2, 5), 4), low_copy(ExpertKey(2, 4), 4)}, [(4, Precision.HIGH)]),
        ({ExpertKey(2, 5)}, [(4, Precision.HIGH)]),
        ({ExpertKey(2, 4)}, [(5, Precision.LOW)]),
        ({ExpertKey(2, 4), low_copy(ExpertKey(2, 5), 4)}, []),
    ):
        fetches = planner.plan(forecasts, held.__contains__)
        assert [(f.key.expert, f.precision) for f in fetches] == left
    assert planner.plan(forecasts, nothing)[1].what(4) == ExpertKey(6, 5)


def test_reads_of_both_precisions_lose_their_turn():
    queued = {
        ExpertKey(1, 0),
        ExpertKey(1, 3),
        ExpertKey(2, 0),
        ExpertKey(5, 3),
        ExpertKey(5, 7),
        ExpertKey(6, 3),
    }
    stale, left = WholeSet().after_routing(event(1, [3]), queued, 4)
    assert set(stale) == {ExpertKey(1, 0), ExpertKey(5, 7)}
    assert left == {ExpertKey(2, 0), ExpertKey(6, 3)}


def test_by_gain_fetches_what_saves_most():
    """Both experts would run on the CPU one after the other; the likelier is worth more."""
    plan = ByGain(COST, 2).plan([ahead(1, e0=0.9, e1=0.1)], nothing)
    assert [f.key.expert for f in plan] == [0, 1]
    assert ByGain(COST, 2).plan([ahead(1, e0=0.9, e1=0.1)], lambda key: True) == []


def test_plec_shares_and_corrects():
    assert share_slots([3, 2], 4) == [3, 1]
    assert share_slots([5, 2], 4) == [4, 0]
    plan = Plec(4, 0.5).plan([ahead(2, e0=0.9, e1=0.8), ahead(1, e2=0.9, e3=0.8, e4=0.7, e5=0.2)], nothing)
    assert [f.key for f in plan] == [ExpertKey(1, 2), ExpertKey(1, 3), ExpertKey(1, 4), ExpertKey(2, 0)]
    missing, vain = correction(event(1, (2, 6)), ahead(1, e2=0.9, e3=0.8), lambda key: key.expert == 2)
    assert [(f.key, f.priority) for f in missing] == [(ExpertKey(1, 6), Priority.CORRECTION)]
    assert vain == [ExpertKey(1, 3)]


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_plec_with_an_oracle_never_misses(seed, sticky):
    """With slots for two layers and the true paths every expert is there in time."""
    events = random_events(seed, layers=3, experts=8, top_k=2, steps=20, sticky=sticky)
    oracle, planner = Oracle(events, ahead=1), Plec(slots=2)
    held = {ExpertKey(e.layer, x) for e in events[:1] for x in e.experts}
    for e in events:
        assert {ExpertKey(e.layer, x) for x in e.experts} <= held
        held = {key for key in held if key.layer == e.layer}  # the slots of finished layers are free
        held |= {fetch.key for fetch in planner.plan(oracle.after_gate(e), held.__contains__)}
        assert len(held) <= 4


def test_whole_set_in_order_of_layers():
    plan = WholeSet().plan([ahead(2, e0=0.9), ahead(1, e2=0.1, e3=0.1)], nothing)
    assert [f.key for f in plan] == [ExpertKey(1, 2), ExpertKey(1, 3), ExpertKey(2, 0)]


def test_adaptive_horizon_follows_stalls_and_waste():
    horizon = AdaptiveHorizon(experts=2, t_expert=3e-3, t_layer=4e-3, limit=3)
    assert horizon.layers == 2
    assert [horizon.observe(0.2, 0.0), horizon.observe(0.2, 0.0)] == [3, 3]
    assert [horizon.observe(0.0, 0.9) for _ in range(3)] == [2, 1, 1]


def every_later(forecasts, holds, budget, layers):
    """AllLater, expert by expert."""
    best = {}
    for f in forecasts:
        for expert, p in zip(f.experts, f.probabilities, strict=True):
            key, value = ExpertKey(f.layer, expert), p / sum(f.probabilities) * (1 - f.horizon / layers)
            if value > best.get(key, 0.0) and not holds(key):
                best[key] = value
    return [(key, best[key]) for key in sorted(best, key=lambda key: (-best[key], key))[:budget]]


def every_gain(forecasts, holds, budget, cost, top_k):
    """ByGain, with a schedule of its own for each candidate."""
    gains = []
    for f in forecasts:
        tokens = dict.fromkeys(f.experts[:top_k], 1)
        there = {expert for expert in tokens if holds(ExpertKey(f.layer, expert))}
        for expert, chance in list(zip(f.experts, f.probabilities, strict=True))[:top_k]:
            saved = two_ended(tokens, there, cost).seconds - two_ended(tokens, there | {expert}, cost).seconds
            if expert not in there and saved > 0:
                gains.append((saved * chance, f.horizon, ExpertKey(f.layer, expert)))
    gains.sort(key=lambda gain: (-gain[0], gain[1], gain[2]))
    return [(key, gain) for gain, _, key in gains[:budget]]


@given(data=st.data(), seed=st.integers(0, 2**20), budget=st.one_of(st.none(), st.integers(0, 9)))
def test_the_reads_of_looking_at_every_expert(data, seed, budget):
    rng = random.Random(seed)
    steps = st.sampled_from([0.1, 0.2, 0.25, 0.4])  # equal ones too: then the key decides
    forecasts = []
    for horizon in rng.sample(range(1, 6), rng.randint(1, 4)):
        experts = rng.sample(range(9), rng.randint(1, 9))
        p = sorted((data.draw(steps) for _ in experts), reverse=True)
        forecasts.append(Forecast(0, rng.randint(0, 4), tuple(experts), tuple(p), horizon, "t"))
    there = {ExpertKey(layer, e) for layer in range(5) for e in range(9) if rng.random() < 0.5}
    holds = there.__contains__
    found = AllLater(5).plan(forecasts, holds, budget)
    assert [(f.key, f.score) for f in found] == every_later(forecasts, holds, budget, 5)
    planner = ByGain(COST, 4)
    for _ in range(2):
        found = planner.plan(forecasts, holds, budget)
        assert [(f.key, f.score) for f in found] == every_gain(forecasts, holds, budget, COST, 4)
