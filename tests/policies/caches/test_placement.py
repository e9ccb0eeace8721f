"""Slots per layer and the swap after the prompt."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.policies.caches.prefill_swap import swaps
from gangline.policies.caches.slot_split import adapmoe_loads, by_misses, knapsack


@pytest.mark.parametrize(("slots", "experts"), [(0, 8), (3, 8), (8, 8)])
def test_adapmoe_formula_at_its_corners(slots, experts):
    """beta = 0, alpha = 0 gives 2 (1 - s/N); alpha = 1 gives (1 - s/N) (1 - beta)."""
    assert adapmoe_loads(slots, experts, 0.0, 0.0) == pytest.approx(2 * (1 - slots / experts))
    assert adapmoe_loads(slots, experts, 0.3, 1.0) == pytest.approx((1 - slots / experts) * 0.7)


@pytest.mark.parametrize(("total", "expected"), [(4, [2, 2]), (8, [5, 3]), (12, [8, 4])])
def test_adapmoe_example(total, expected):
    """N = 8 and accuracies 0.5 and 0.9."""
    loads = [[adapmoe_loads(s, 8, beta, 0.0) for s in range(9)] for beta in (0.5, 0.9)]
    assert knapsack(loads, total) == expected


curves = st.lists(
    st.lists(st.integers(0, 9), min_size=2, max_size=5).map(lambda x: sorted(x, reverse=True)),
    min_size=1,
    max_size=4,
)


@given(curves, st.integers(0, 12))
def test_knapsack_is_the_best_split(loads, slots):
    split = knapsack(loads, slots)
    room = min(slots, sum(len(c) - 1 for c in loads))
    assert sum(split) == room
    ways = itertools.product(*(range(len(c)) for c in loads))
    best = min(sum(c[n] for c, n in zip(loads, way, strict=True)) for way in ways if sum(way) == room)
    assert sum(c[n] for c, n in zip(loads, split, strict=True)) == best


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 12)
)
def test_greedy_is_optimal_on_convex_curves(savings, slots):
    loads = []
    for row in savings:
        row = sorted(row, reverse=True)
        loads.append([sum(row[i:]) for i in range(len(row) + 1)])
    total = [sum(c[n] for c, n in zip(loads, f(loads, slots), strict=True)) for f in (by_misses, knapsack)]
    assert total[0] == total[1]


def test_swap_takes_the_clearly_hotter():
    tokens = [10, 0, 8, 3, 0, 4]
    assert swaps(tokens, [1, 3, 4]) == [(0, 1), (2, 4), (5, 3)]
    assert swaps([100, 104, 106], [0]) == [(2, 0)]
    assert swaps([100, 104], [0]) == [], "within 5 %"
    assert swaps(tokens, [1, 3, 4], most=1) == [(0, 1)]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.data())
def test_swaps_only_gain(tokens, data):
    resident = data.draw(st.sets(st.integers(0, len(tokens) - 1)))
    pairs = swaps(tokens, resident)
    assert len(pairs) <= len(tokens) // 2
    assert not {comes for comes, _ in pairs} & resident
    assert {goes for _, goes in pairs} <= resident
    assert all(tokens[comes] > tokens[goes] for comes, goes in pairs)
