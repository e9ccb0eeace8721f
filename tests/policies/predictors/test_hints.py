"""Predictors that need no training: golden vectors of their cards and what every hint must obey."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.policies.predictors.baselines import LastToken, Popularity
from gangline.policies.predictors.next_gate import NextGate, linear_gate
from gangline.policies.predictors.oracle import Oracle
from gangline.policies.predictors.ranking import forecast, recall
from gangline.policies.predictors.token_statistics import TokenStatistics
from gangline.policies.predictors.trace_matching import TraceMatching
from policy_replay import event, random_events


def test_ranking_is_descending_and_leaves_zeros_out():
    ranked = forecast(3, 1, [0.1, 0.0, 0.5, 0.1], 2, "t")
    assert ranked.experts == (2, 0, 3)
    assert ranked.probabilities == (0.5, 0.1, 0.1)
    assert forecast(3, 1, [0.1, 0.0, 0.5, 0.1], 2, "t", keep=1).experts == (2,)
    assert recall(ranked, (0, 1), 2) == 0.5


def one_request(predictor, routes):
    """Send one request: ``routes`` is one dict layer -> experts for each pass. Returns all forecasts."""
    out = []
    for step, layers in enumerate(routes):
        for layer, ids in layers.items():
            out += predictor.after_gate(event(layer, ids, step))
    predictor.end_request()
    return out


def test_trace_matching_knows_a_repeated_request():
    routes = [{0: (1, 2), 1: (3,), 2: (0, 3)}] * 2
    predictor = TraceMatching([4, 4, 4])
    assert one_request(predictor, routes) == [], "an empty collection forecasts nothing"
    used = {0: {1, 2}, 1: {3}, 2: {0, 3}}
    for f in one_request(predictor, routes):
        assert set(f.experts) == used[f.layer]
        assert sum(f.probabilities) == pytest.approx(1)


def test_trace_matching_names_pass_and_horizon():
    predictor = TraceMatching([2, 2, 2])
    one_request(predictor, [{0: (0,), 1: (1,), 2: (0,)}])
    forecasts = predictor.after_gate(event(1, (1,), step=7))
    assert [(f.step, f.layer, f.horizon) for f in forecasts] == [(7, 2, 1), (8, 0, 2), (8, 1, 3)]


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_trace_matching_keeps_its_capacity_and_ignores_order(seed, capacity, neighbours):
    predictor = TraceMatching([5, 5], capacity, neighbours)
    for request in range(6):
        for e in random_events(seed + request, layers=2, experts=5, steps=4):
            predictor.after_gate(e)
        predictor.end_request()
        assert len(predictor.collection) <= capacity
    for e in random_events(seed + 99, layers=2, experts=5, steps=2):
        predictor.after_gate(e)
    before = predictor.predicted()
    predictor.collection.reverse()
    np.testing.assert_allclose(predictor.predicted(), before)


def test_trace_matching_replaces_the_most_similar():
    predictor = TraceMatching([4], capacity=2)
    for ids in [(0,), (3,), (3,)]:
        one_request(predictor, [{0: ids}])
    assert sorted(int(eam.argmax()) for eam in predictor.collection) == [0, 3]


def test_next_gate_with_equal_inputs_is_exact(seed):
    """If the next gate sees what it is forecast from, the forecast is its own top-k."""
    rng = np.random.default_rng(seed)
    gates = [linear_gate(rng.normal(size=(6, 5))) for _ in range(3)]
    x_TD = rng.normal(size=(1, 5))
    predictor = NextGate(gates, ahead=3)
    first, second = predictor.after_gate(event(0, (0,), detail=RoutingDetail(gate_input_TD=x_TD)))
    assert (first.layer, second.layer) == (1, 2)
    for f in (first, second):
        scores_E = gates[f.layer](x_TD)[0]
        assert f.experts == tuple(np.argsort(-scores_E))
        assert sum(f.probabilities) == pytest.approx(1)
    assert predictor.after_gate(event(2, (0,), detail=RoutingDetail(gate_input_TD=x_TD))) == []


def test_next_gate_votes_with_the_top_k_of_each_token():
    gates = [None, lambda x: np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])]
    detail = RoutingDetail(gate_input_TD=np.zeros((2, 1)))
    (f,) = NextGate(gates, top_k=1).after_gate(event(0, (0,), detail=detail))
    assert f.experts == (2, 0) and f.probabilities == pytest.approx((0.35, 0.3))
    with pytest.raises(UsageError, match="needs gate inputs"):
        NextGate(gates).after_gate(event(0, (0,)))


def token_event(layer, tokens, ids, step=0):
    detail = RoutingDetail(ids_TK=np.array(ids), token_ids_T=np.array(tokens))
    experts, counts = np.unique(np.array(ids), return_counts=True)
    return RoutingEvent(
        step, layer, "prefill", len(tokens), tuple(experts.tolist()), tuple(counts.tolist()), detail
    )


def test_token_statistics_learn_a_hash_router(seed):
    """A router that is a function of the token id is predicted fully."""
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(8)[:2] for _ in range(20)])
    tokens = rng.integers(0, 20, size=400)
    predictor = TokenStatistics([8, 8], prior=0.1).fit([token_event(0, tokens, table[tokens])])
    for token in set(tokens.tolist()):
        (f,) = predictor.on_request(1, [token])
        assert set(f.experts[:2]) == set(table[token].tolist())
        assert sum(f.probabilities) == pytest.approx(1)


def test_token_statistics_back_off_to_the_layer():
    predictor = TokenStatistics([4], prior=1.0).fit([token_event(0, [7, 7, 9], [[0], [0], [1]])])
    (unseen,) = predictor.on_request(0, [5])
    assert unseen.probabilities == pytest.approx((2 / 3, 1 / 3))
    (seen,) = predictor.on_request(0, [9])
    assert dict(zip(seen.experts, seen.probabilities, strict=True)) == pytest.approx({1: 2 / 3, 0: 1 / 3})
    with pytest.raises(UsageError, match="mode ids"):
        predictor.after_gate(event(0, (1,)))


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8, 16, None]))
def test_oracle_is_right_at_every_horizon(seed, ahead):
    events = random_events(seed, layers=3, experts=6, steps=8)
    by_place = {(e.step, e.layer): e for e in events}
    oracle = Oracle(events, ahead)
    first = oracle.on_request(0, [])
    assert len(first) == (6 if ahead is None else min(ahead, len(events)))
    for index, e in enumerate(events):
        forecasts = oracle.after_gate(e)
        assert [f.horizon for f in forecasts] == list(range(1, len(forecasts) + 1))
        for f in forecasts:
            assert set(f.experts) == set(by_place[f.step, f.layer].experts)
            assert (f.step, f.layer) == (events[index + f.horizon].step, events[index + f.horizon].layer)
    with pytest.raises(UsageError, match="build it anew"):
        oracle.after_gate(events[0])


def test_baselines_order_on_a_sticky_trace(seed):
    """Oracle beats the last token, which beats popularity, which beats chance, where routing is sticky."""
    events = random_events(seed, layers=2, experts=16, top_k=2, steps=600, sticky=0.6)
    scores = []
    for predictor in (Oracle(events), LastToken(2), Popularity([16, 16])):
        coming, total, n = {}, 0.0, 0
        for e in events:
            if (f := coming.get((e.step, e.layer))) is not None:
                total, n = total + recall(f, e.experts, 2), n + 1
            for f in predictor.after_gate(e):
                coming[f.step, f.layer] = f
        scores.append(total / n)
    assert scores[0] == 1.0
    assert scores[0] > scores[1] > scores[2]
