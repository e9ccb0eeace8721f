"""The default cache against the shared test vectors and simple laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches import LayerLRU, RandomEviction
from gangline.policies.caches.quotas import layer_quotas
from policy_replay import replay, steady


def test_flooding_with_a_pool_of_one_working_set():
    """L=4, k=2, the same experts every token, 50 tokens: 392 hits of 400 with 8 slots."""
    assert replay(LayerLRU(10, [2] * 4, [8] * 4), 10, steady(4, (0, 1), 50)) == 392


def test_flooding_below_one_working_set_still_hits():
    """A global LRU with 6 slots has no hit here; layers that have their quota keep hitting."""
    hits = replay(LayerLRU(6, [2] * 4, [8] * 4), 6, steady(4, (0, 1), 50))
    assert hits >= 196


@given(st.data())
def test_quotas_fit_and_leave_room(data):
    layers = data.draw(st.integers(1, 12))
    experts = data.draw(st.lists(st.integers(4, 64), min_size=layers, max_size=layers))
    top_k = [data.draw(st.integers(1, 4)) for _ in range(layers)]
    slots = data.draw(st.integers(2, sum(experts) + 5))
    quotas = layer_quotas(slots, top_k, experts)
    assert all(0 <= quota <= e for quota, e in zip(quotas, experts, strict=True))
    if slots >= sum(experts):
        assert quotas == experts
    else:
        assert sum(quotas) < slots, "at least one slot stays free for streaming"


def test_prompt_keeps_the_popular_experts():
    policy = LayerLRU(6, [2], [16])
    counts = tuple(range(1, 17))
    resident = set()
    event = RoutingEvent(1, 0, "prefill", 40, tuple(range(16)), counts)
    policy.on_event(event, ())
    for expert in range(16):
        key = ExpertKey(0, expert)
        if len(resident) == 6:
            victim = policy.victim(0, lambda key: True)
            resident.remove(victim)
            policy.evicted(victim)
        resident.add(key)
        policy.admitted(key)
    assert {key.expert for key in resident} == {10, 11, 12, 13, 14, 15}


def test_victim_waits_when_everything_is_leased():
    for policy in (LayerLRU(2, [1], [4]), RandomEviction(0)):
        policy.admitted(ExpertKey(0, 0))
        policy.admitted(ExpertKey(0, 1))
        assert policy.victim(0, lambda key: False) is None


@pytest.mark.parametrize("capacity", [4, 8, 12, 16])
def test_hits_do_not_fall_with_capacity(capacity, seed):
    import random

    rng = random.Random(seed)
    events = [
        RoutingEvent(s, layer, "decode", 1, tuple(sorted(rng.sample(range(8), 2))), (1, 1))
        for s in range(60)
        for layer in range(2)
    ]
    small = replay(LayerLRU(capacity, [2, 2], [8, 8]), capacity, events)
    large = replay(LayerLRU(16, [2, 2], [8, 8]), 16, events)
    assert large >= small
