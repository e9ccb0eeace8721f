"""Placement of experts on devices."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.policies.schedule.balance import correlated_placement, greedy_placement, imbalance

loads = st.integers(1, 4).flatmap(
    lambda room: st.integers(1, 4).flatmap(
        lambda devices: st.tuples(
            st.just(devices),
            st.lists(st.floats(0, 10), min_size=room * devices, max_size=room * devices),
        )
    )
)


@given(loads)
def test_each_device_gets_its_share_of_experts(case):
    devices, load_E = case
    for place in (
        greedy_placement(load_E, devices),
        correlated_placement([load_E, load_E[::-1]], devices),
    ):
        assert sorted(place) == sorted(list(range(devices)) * (len(load_E) // devices))


@given(st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_greedy_is_within_four_thirds_of_the_best_unconstrained(load_E):
    """Room for two on each of three devices, against every division that keeps that room."""
    place = greedy_placement(load_E, 3)
    heaviest = max(sum(load_E[e] for e in range(6) if place[e] == d) for d in range(3))
    best = min(
        max(sum(load_E[e] for e in range(6) if way[e] == d) for d in range(3))
        for way in itertools.product(range(3), repeat=6)
        if all(way.count(d) == 2 for d in range(3))
    )
    assert heaviest <= 4 / 3 * best + 1e-9


def test_correlated_keeps_twins_apart():
    """Two experts are busy in even batches, two in odd ones; mean loads alone cannot tell."""
    even, odd = np.array([0.5, 0.0] * 4), np.array([0.0, 0.5] * 4)
    load_BE = np.stack([even, even, odd, odd], axis=1)
    place = correlated_placement(load_BE, 2)
    assert place[0] != place[1] and place[2] != place[3]
    assert imbalance(load_BE, place, 2) == pytest.approx(0)
    assert imbalance(load_BE, [0, 0, 1, 1], 2) == pytest.approx(0.5)


def test_uneven_division_is_refused():
    with pytest.raises(UsageError, match="5 experts do not divide evenly over 2 devices"):
        greedy_placement([1.0] * 5, 2)
