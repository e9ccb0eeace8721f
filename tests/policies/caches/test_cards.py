"""The golden vectors of each published cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail
from gangline.core.forecast import Forecast
from gangline.core.keys import ExpertKey
from gangline.core.precision import Precision
from gangline.policies.caches.arc import ARC, ArcLists
from gangline.policies.caches.buffering import ExpertBuffering
from gangline.policies.caches.fate import FateCache, shallow_layers, shallow_quotas
from gangline.policies.caches.fifo import FIFO
from gangline.policies.caches.hobbit import HobbitCache
from gangline.policies.caches.lfru import LFRU
from gangline.policies.caches.lfu import LFU
from gangline.policies.caches.lookahead_belady import LookaheadBelady
from gangline.policies.caches.lru import LRU
from gangline.policies.caches.moe_infinity import MoEInfinityCache
from gangline.policies.caches.mrs import MRS
from gangline.policies.caches.sida_residency import SidaResidency
from gangline.policies.caches.static_hot import StaticHot, hottest
from policy_replay import event, random_events, replay


def anything(key):
    return True


def fill(policy, *keys):
    for layer, expert in keys:
        policy.admitted(ExpertKey(layer, expert))


def scored(policy, scores):
    policy.on_event(event(0, (0,), detail=RoutingDetail(scores_TE=np.array([scores]))), ())


def test_mrs_vectors():
    policy = MRS([4], [2], alpha=0.5)
    scored(policy, [0.6, 0.3, 0.1, 0.0])
    np.testing.assert_allclose(policy.score_E[0], [0.3, 0.15, 0, 0])
    scored(policy, [0.1, 0.2, 0.6, 0.1])
    np.testing.assert_allclose(policy.score_E[0], [0.15, 0.175, 0.3, 0])
    fill(policy, (0, 0), (0, 1), (0, 2))
    assert policy.victim(0, anything) == ExpertKey(0, 0)


@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=6))
def test_mrs_folds_a_prompt_token_by_token(rows):
    one, whole = MRS([5], [3]), MRS([5], [3])
    for row in rows:
        scored(one, row)
    whole.on_event(event(0, (0,), detail=RoutingDetail(scores_TE=np.array(rows))), ())
    np.testing.assert_allclose(one.score_E[0], whole.score_E[0], atol=1e-300)  # subnormal numbers lose digits


def test_mrs_with_alpha_one_remembers_the_last_scores_only():
    policy = MRS([3], [3], alpha=1.0)
    scored(policy, [0.5, 0.3, 0.2])
    scored(policy, [0.1, 0.2, 0.7])
    np.testing.assert_allclose(policy.score_E[0], [0.1, 0.2, 0.7])


def test_mrs_asks_for_scores():
    with pytest.raises(UsageError, match="record the trace with scores"):
        MRS([4], [2]).on_event(event(0, (0, 1)), ())


def test_hobbit_distance_of_layers():
    policy = HobbitCache([1] * 4, (0, 0, 0, 1))
    policy.on_event(event(1, (0,)), ())
    assert [policy.priority(ExpertKey(layer, 0)) for layer in (1, 2, 3, 0)] == [1, 0.75, 0.5, 0.25]


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 1))
def test_hobbit_with_recency_alone_is_lru(seed, slots, sticky):
    events = random_events(seed, layers=1, experts=8, top_k=2, sticky=sticky)
    assert replay(HobbitCache([8], (1, 0, 0, 0)), slots, events) == replay(LRU(), slots, events)


def test_hobbit_low_precision_does_not_count_as_high():
    policy = HobbitCache([2], (0, 0, 1, 0))
    used = event(0, (0, 1))
    policy.on_event(used, ())
    policy.on_precision(used, {1: Precision.LOW})
    fill(policy, (0, 0), (0, 1))
    assert (policy.priority(ExpertKey(0, 0)), policy.priority(ExpertKey(0, 1))) == (1, 0)
    policy.on_request_start()
    assert policy.priority(ExpertKey(0, 0)) == 0


def test_hobbit_weights_sum_to_one():
    with pytest.raises(UsageError, match="sum to 1"):
        HobbitCache([4, 4], (0.5, 0.5, 0.5, 0))


def test_arc_lists_move_the_target():
    """Megiddo and Modha's cases with two slots: B1 hit grows p, B2 hit shrinks it."""
    a, b, c, d = (ExpertKey(0, e) for e in range(4))
    lists = ArcLists(2)
    lists.admitted(a)
    lists.used(a)  # a: T2
    lists.admitted(b)  # b: T1
    assert lists.victim(anything) == b  # |T1| = 1 > p = 0
    lists.evicted(b)
    lists.admitted(c)
    lists.used(b)  # ghost hit in B1
    assert lists.target == 1
    assert lists.victim(anything) == a  # |T1| = 1 is not over p = 1
    lists.evicted(a)
    lists.admitted(b)
    assert list(lists.again) == [b] and not lists.lost_once
    lists.used(a)  # ghost hit in B2
    assert lists.target == 0
    assert lists.victim(lambda key: key != c) == b
    assert lists.victim(lambda key: key == d) is None


@given(st.integers(0, 10**6), st.integers(2, 9), st.floats(0, 1))
def test_arc_lists_stay_within_their_capacity(seed, slots, sticky):
    policy = ARC(slots)
    replay(policy, slots, random_events(seed, layers=1, experts=12, top_k=2, sticky=sticky))
    lists = policy._lists[0]
    assert len(lists.once) + len(lists.lost_once) <= slots
    assert lists._size() <= 2 * slots
    assert 0 <= lists.target <= slots


def test_arc_resists_a_scan():
    """Two experts used all the time survive a scan that flushes LRU."""
    order = [0, 1, 0, 1] * 3 + list(range(2, 12)) + [0, 1]
    events = [event(0, (expert,), step) for step, expert in enumerate(order)]
    assert replay(ARC(4), 4, events) == replay(LRU(), 4, events) + 2


def test_fate_holds_the_first_layers_whole():
    assert shallow_quotas(20, [2] * 4, [8] * 4, 1) == [8, 4, 4, 4]
    assert shallow_quotas(10, [2] * 4, [8] * 4, 3) == [3, 3, 2, 2]  # one whole layer would starve the rest
    assert shallow_quotas(99, [2] * 4, [8] * 4, 2) == [8] * 4
    assert shallow_layers([0.4, 0.6, 0.9, 0.7], 0.8) == 2
    policy = FateCache(10, [2, 2], [8, 8], 1)
    events = random_events(5, layers=2, experts=8, steps=200, sticky=0.0)
    replay(policy, 10, events)
    assert {key.expert for key in policy._groups[0]} == set(range(8))


@given(st.integers(2, 80), st.integers(0, 6), st.lists(st.integers(2, 16), min_size=1, max_size=6))
def test_fate_quotas_use_all_slots(slots, shallow, experts):
    quotas = shallow_quotas(slots, [1] * len(experts), experts, shallow)
    assert sum(quotas) == min(slots, sum(experts))
    assert all(q <= e for q, e in zip(quotas, experts, strict=True))


def test_moe_infinity_favours_early_layers():
    """Without a forecast all experts of a layer are alike, and the last layer goes first."""
    policy = MoEInfinityCache([4, 4])
    policy.on_event(event(0, (0,)), ())
    fill(policy, (0, 0), (0, 1), (1, 0))
    assert policy.priority(ExpertKey(0, 0)) == pytest.approx(0.2501)
    assert policy.priority(ExpertKey(1, 0)) == pytest.approx(0.2501 / 2)
    assert policy.victim(0, anything) == ExpertKey(1, 0)
    policy.on_forecast([Forecast(0, 1, (0,), (3.0,), 1, "t"), Forecast(0, 0, (1, 0), (0.9, 0.3), 0, "t")])
    assert policy.priority(ExpertKey(1, 0)) == pytest.approx(1.0001 / 2)
    assert policy.victim(0, anything) == ExpertKey(0, 0)


def test_moe_infinity_without_traces_falls_back_to_use_counts():
    policy = MoEInfinityCache([4])
    policy.on_event(event(0, (0, 1), counts=(5, 2)), ())
    fill(policy, (0, 0), (0, 1))
    assert policy.victim(0, anything) == ExpertKey(0, 1)


def test_expert_buffering_example():
    """E=4, two slots, the batch needs 1, 2, 3: evict 2, keep 1."""
    policy = ExpertBuffering()
    policy.on_event(event(0, (1, 2, 3)), ())
    fill(policy, (0, 1), (0, 2))
    assert policy.victim(0, anything) == ExpertKey(0, 2)
    policy.on_event(event(0, (2, 3)), (2,))
    assert policy.victim(0, anything) == ExpertKey(0, 1), "inactive goes first"


@given(st.integers(3, 10), st.integers(1, 9), st.integers(1, 8))
def test_lifo_is_never_worse_than_fifo_on_a_cyclic_sweep(experts, slots, rounds):
    events = [event(0, (e,), r * experts + e) for r in range(rounds) for e in range(experts)]
    slots = min(slots, experts)
    fifo = replay(FIFO(), slots, events)
    assert replay(FIFO(newest_first=True), slots, events) >= fifo
    assert replay(ExpertBuffering(), slots, events) >= fifo


def test_lookahead_belady_evicts_the_furthest_request():
    policy = LookaheadBelady()
    policy.on_event(event(0, (0,), step=0), ())
    fill(policy, (0, 0), (0, 1), (0, 2))
    policy.on_forecast([Forecast(s, 0, (e,), (1.0,), s, "queue") for s, e in ((1, 0), (2, 2), (3, 1))])
    assert policy.victim(0, anything) == ExpertKey(0, 1)
    assert policy.victim(0, lambda key: key.expert != 1) == ExpertKey(0, 2)
    policy.on_event(event(0, (0,), step=1), (0,))
    assert policy.victim(0, anything) == ExpertKey(0, 0), "its request is past"


@given(st.integers(0, 10**6), st.integers(2, 8))
def test_lookahead_belady_with_the_whole_queue_is_at_least_lru(seed, slots):
    events = random_events(seed, layers=1, experts=8, steps=30)
    policy = LookaheadBelady()
    policy.on_forecast([Forecast(e.step, 0, e.experts, (1.0, 1.0), 1, "queue") for e in events])
    assert replay(policy, slots, events) >= replay(LRU(), slots, events)


def test_lfu_counts_tokens_and_can_forget():
    for in_cache, expected in ((False, 2), (True, 1)):
        policy = LFU(in_cache=in_cache)
        policy.on_event(event(0, (1, 2), counts=(9, 4)), ())
        fill(policy, (0, 1), (0, 2))
        policy.evicted(ExpertKey(0, 1))
        policy.on_event(event(0, (1,)), ())
        fill(policy, (0, 1))
        assert policy.victim(0, anything) == ExpertKey(0, expected)
    policy = LFU(per_request=True)
    policy.on_event(event(0, (1,), counts=(9,)), ())
    fill(policy, (0, 1), (0, 2))
    policy.on_request_start()
    policy.on_event(event(0, (2,)), (2,))
    assert policy.victim(0, anything) == ExpertKey(0, 1)


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(0, 1))
def test_lfru_between_lfu_and_lru(seed, slots, sticky):
    """Nothing privileged is LFU; everything privileged but the oldest is LRU."""
    events = random_events(seed, layers=1, experts=8, top_k=1, sticky=sticky)
    assert replay(LFRU(privileged=1.0), slots, events) == replay(LRU(), slots, events)
    assert replay(LFRU(privileged=0.0, window=10**9), slots, events) == replay(LFU(), slots, events)


def test_lfru_protects_the_newcomer():
    policy = LFRU(privileged=0.5)
    policy.on_event(event(0, (0,), counts=(50,)), ())
    fill(policy, (0, 0))
    policy.on_event(event(0, (1,), counts=(5,)), ())
    fill(policy, (0, 1))
    for expert in (2, 3):
        policy.on_event(event(0, (expert,)), ())
        fill(policy, (0, expert))
    assert policy.victim(0, anything) == ExpertKey(0, 1), "of the old half the less frequent"


def test_static_hot_never_moves_the_hot():
    tokens = {ExpertKey(0, 0): 5, ExpertKey(0, 1): 9, ExpertKey(1, 0): 5}
    assert hottest(tokens, 2) == [ExpertKey(0, 1), ExpertKey(0, 0)]
    policy = StaticHot([ExpertKey(0, 0)])
    fill(policy, (0, 0))
    assert policy.victim(0, anything) is None
    assert not policy.admit(ExpertKey(0, 3), anything)
    fill(policy, (0, 3))
    assert policy.victim(0, anything) == ExpertKey(0, 3)


def test_sida_keeps_the_predicted_set():
    policy = SidaResidency()
    policy.on_event(event(0, (0,), step=0), ())
    fill(policy, (0, 0), (0, 1), (0, 2))
    policy.on_forecast([Forecast(0, 0, (0,), (1.0,), 0, "sida"), Forecast(1, 0, (1,), (1.0,), 1, "sida")])
    assert policy.victim(0, anything) == ExpertKey(0, 2)
    assert policy.victim(0, lambda key: key.expert != 2) == ExpertKey(0, 0)
    policy.on_event(event(0, (1,), step=1), (1,))
    assert policy.victim(0, anything) == ExpertKey(0, 0)
