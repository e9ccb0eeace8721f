"""The ring of layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.policies.schedule import LayerRing, RingLoad, ring_seconds


@given(st.integers(1, 12), st.data())
def test_ring_never_overwrites_and_wraps_around(layers, data):
    slots = data.draw(st.integers(1, layers))
    ring = LayerRing(layers, slots)
    held = {load.slot: load.layer for load in ring.start()}
    loads_of_pass = []
    for position in range(4 * layers):
        now = ring.slot_of_next()
        assert now.layer == position % layers
        assert held[now.slot] == now.layer, "computed from the slot that holds it"
        load = ring.computed()
        if load is not None:
            assert load.slot == now.slot, "only the slot just finished is written"
            held[load.slot] = load.layer
            loads_of_pass.append(load.layer)
    if slots < layers:
        assert sorted(loads_of_pass[:layers]) == list(range(layers)), "a pass moves every layer once"
    else:
        assert loads_of_pass == []


def test_two_slots_are_double_buffering():
    ring = LayerRing(4, 2)
    assert ring.start() == [RingLoad(0, 0), RingLoad(1, 1)]
    assert [ring.computed() for _ in range(4)] == [
        RingLoad(2, 0),
        RingLoad(3, 1),
        RingLoad(0, 0),
        RingLoad(1, 1),
    ]
    assert ring_seconds(4, 2.0, 3.0) == 12.0
    with pytest.raises(UsageError, match="1 to 4 slots, not 5"):
        LayerRing(4, 5)
