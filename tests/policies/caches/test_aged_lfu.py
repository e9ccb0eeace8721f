"""Uses age with every token of their layer; coming layers count a little more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies.caches import make_cache
from gangline.policies.caches.aged_lfu import AgedLFU
from policy_replay import replay

LAYERS, EXPERTS = 3, 4


def decode(step, layer, *experts):
    return RoutingEvent(step, layer, "decode", 1, experts, (1,) * len(experts))


def test_uses_age_by_the_tokens_of_their_layer():
    cache = AgedLFU([EXPERTS] * LAYERS, age=0.5, nearness=0.0)
    for step in range(3):
        cache.on_event(decode(step, 0, 0 if step < 2 else 1), ())
    assert cache.priority(ExpertKey(0, 0)) == pytest.approx(0.75)  # (1 / 2 + 1) / 2
    assert cache.priority(ExpertKey(0, 1)) == 1
    cache.on_event(decode(3, 1, 2), ())
    assert cache.priority(ExpertKey(0, 1)) == 1  # another layer's token is not this layer's


@given(st.integers(1, 40), st.floats(0.5, 1))
def test_a_prompt_counts_as_its_tokens_one_by_one(tokens, age):
    """If each token of it uses the same experts."""
    at_once, one_by_one = (AgedLFU([EXPERTS], age=age, nearness=0.0) for _ in range(2))
    at_once.on_event(RoutingEvent(0, 0, "prefill", tokens, (1, 3), (tokens, tokens)), ())
    for step in range(tokens):
        one_by_one.on_event(decode(step, 0, 1, 3), ())
    for expert in range(EXPERTS):
        key = ExpertKey(0, expert)
        assert at_once.priority(key) == pytest.approx(one_by_one.priority(key))


def test_the_next_layer_counts_most_and_the_present_one_least():
    cache = AgedLFU([EXPERTS] * LAYERS, nearness=3.0)
    cache.on_event(decode(0, 1, 0), ())
    of_layers = [cache.priority(ExpertKey(layer, 2)) for layer in range(LAYERS)]
    assert of_layers == pytest.approx([2.0, 1.0, 3.0])


def test_what_is_expected_goes_last_until_its_layer_has_routed():
    cache = AgedLFU([EXPERTS] * LAYERS)
    resident = [ExpertKey(1, expert) for expert in range(EXPERTS)]
    for key in resident:
        cache.admitted(key)
    for step in range(9):
        cache.on_event(decode(step, 1, 0, 1), ())
    cache.on_event(decode(9, 0, 0), ())
    cache.on_forecast([Forecast(9, 1, (0, 3), (0.5, 0.5), 1, "test")])
    cache.on_forecast([Forecast(9, 1, (2, 3), (0.5, 0.5), 1, "test")])  # a newer one
    gone = []
    while len(gone) < EXPERTS:
        gone.append(cache.victim(0, lambda key: key not in gone))
    assert [key.expert for key in gone[:2]] == [0, 1]
    cache.on_event(decode(9, 1, 2), ())
    assert cache.victim(0, lambda key: True) == ExpertKey(1, 3)


@given(st.integers(2, EXPERTS - 1), st.permutations(range(EXPERTS)))
def test_without_aging_and_nearness_it_is_lfu(slots, order):
    """Where no two experts are used equally often, that is: LFU breaks ties by the last use."""
    uses = [expert for expert in order for _ in range(4 ** order.index(expert))]
    events = [decode(step, 0, expert) for step, expert in enumerate(uses + list(order))]
    geometry = MoEGeometry((LayerGeometry(EXPERTS, 1, 4, 4),))
    plain = make_cache("lfu", slots=slots, geometry=geometry)
    assert replay(AgedLFU([EXPERTS], 1.0, 0.0), slots, events) == replay(plain, slots, events)


@pytest.mark.parametrize(("age", "nearness"), [(0.0, 1.0), (1.1, 1.0), (0.9, -1.0)])
def test_what_cannot_be(age, nearness):
    with pytest.raises(UsageError, match="0 < age <= 1"):
        AgedLFU([EXPERTS], age, nearness)
