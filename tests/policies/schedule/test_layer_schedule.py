"""HybriMoE, Fiddler and FreeToken on the same clocks, against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.cost import CostTable, Curve, straight
from gangline.policies.schedule import (
    Fiddler,
    FreeTokenSchedule,
    HybriMoESchedule,
    Place,
    q_star,
    split,
    split_contended,
    two_ended,
)
from gangline.policies.schedule.hybrimoe import best_prefixes
from gangline.policies.schedule.protocol import timed
from policy_replay import event

# HybriMoE's own constants, in milliseconds: t_cpu = 0.79 + n, t_gpu = 0.5, t_move = 0.418.
HYBRIMOE = CostTable("t", 418, straight(0.79, 1.0), straight(0.5, 0.0), bandwidth={"host_to_hbm": 1000.0})
INFINITE = float("inf")


def brute_force(tokens, resident, cost):
    """The best of all divisions, residents before fetched and heavy before light on the GPU."""
    best = INFINITE
    for size in range(len(tokens) + 1):
        for gpu in itertools.combinations(tokens, size):
            order = tuple(sorted(gpu, key=lambda e: (e not in resident, -tokens[e])))
            cpu = tuple(e for e in tokens if e not in gpu)
            best = min(best, timed(order, cpu, tokens, resident, cost).seconds)
    return best


layers = st.dictionaries(st.integers(0, 63), st.integers(1, 30), min_size=1, max_size=9)


@given(layers, st.data())
def test_schedule_is_near_the_best_and_never_worse_than_one_side(tokens, data):
    resident = {e for e in tokens if data.draw(st.booleans())}
    greedy = two_ended(tokens, resident, HYBRIMOE)
    queue = tuple(sorted(tokens, key=lambda e: (e not in resident, -tokens[e])))
    for sides in ((queue, ()), ((), queue)):
        assert greedy.seconds <= timed(*sides, tokens, resident, HYBRIMOE).seconds + 1e-9
    plan = best_prefixes(tokens, resident, HYBRIMOE)
    for p in (greedy, plan):
        assert set(p.place) == set(tokens)
        assert {e for e, place in p.place.items() if place is Place.GPU_RESIDENT} <= resident
    assert plan.seconds <= greedy.seconds
    assert plan.seconds == pytest.approx(brute_force(tokens, resident, HYBRIMOE))


def test_two_ended_limits():
    tokens = {0: 5, 1: 3, 2: 1}
    slow_cpu = CostTable("t", 1, Curve(((1, 1e9),)), straight(0.5, 0), bandwidth={"host_to_hbm": 10.0})
    assert set(two_ended(tokens, {0}, slow_cpu).place.values()) == {Place.GPU_RESIDENT, Place.GPU_FETCH}
    no_link = CostTable("t", 1, straight(0.1, 1), straight(0.5, 0), bandwidth={"host_to_hbm": 1e-12})
    assert two_ended(tokens, {0}, no_link).place == {0: Place.GPU_RESIDENT, 1: Place.CPU, 2: Place.CPU}
    no_gpu = CostTable("t", 1, straight(0.1, 1), bandwidth={"host_to_hbm": 1.0})
    assert set(two_ended(tokens, set(), no_gpu).place.values()) == {Place.CPU}


@given(layers)
def test_two_ended_with_all_resident_uses_the_cpu_only_if_it_helps(tokens):
    plan = two_ended(tokens, set(tokens), HYBRIMOE)
    all_gpu = 0.5 * len(tokens)
    if plan.cpu_order:
        assert plan.seconds < all_gpu + 1e-9
    else:
        assert plan.seconds == pytest.approx(all_gpu)


def test_fiddler_crosses_over_at_ten_tokens():
    """7 ms a token against 70 ms for copy and run: nine tokens stay on the CPU, eleven move."""
    cost = CostTable(
        "t", 70, Curve(((1, 7.0), (2, 14.0))), straight(0.0, 0.0), bandwidth={"host_to_hbm": 1.0}
    )
    plan = Fiddler().assign(event(0, (0, 1, 2), counts=(9, 11, 99)), {2}, cost)
    assert plan.place == {0: Place.CPU, 1: Place.GPU_FETCH, 2: Place.GPU_RESIDENT}


@given(layers, st.data())
def test_hybrimoe_beats_fiddler(tokens, data):
    resident = {e for e in tokens if data.draw(st.booleans())}
    e = event(0, tuple(sorted(tokens)), counts=[tokens[x] for x in sorted(tokens)])
    hybrid = HybriMoESchedule().assign(e, resident, HYBRIMOE).seconds
    assert hybrid <= Fiddler().assign(e, resident, HYBRIMOE).seconds + 1e-9


@pytest.mark.parametrize(
    ("dram", "link", "misses", "expected"), [(60, 20, 6, 2), (80, 25, 8, 2), (205, 55, 8, 2), (45, 25, 4, 2)]
)
def test_q_star_examples(dram, link, misses, expected):
    assert q_star(misses, dram, link) == expected
    assert split(misses, dram, link) == (misses if dram <= 2 * link else expected)


@given(st.integers(0, 12), st.floats(1, 100), st.floats(1, 100))
def test_split_is_the_best_integer(misses, link, cpu):
    q = split_contended(misses, link, cpu)
    assert 0 <= q <= misses
    times = [max(i / link, (misses - i) / cpu) for i in range(misses + 1)]
    assert times[q] == pytest.approx(min(times))


def test_freetoken_fetches_what_was_active_last():
    cost = CostTable("t", 10, straight(0, 1), straight(0, 0.1), bandwidth={"host_to_hbm": 20.0}, dram=60.0)
    schedule = FreeTokenSchedule()
    schedule.assign(event(3, (4, 5)), {4, 5}, cost)
    plan = schedule.assign(event(3, (0, 1, 2, 3, 4, 5)), set(), cost)
    assert plan.gpu_order == (4, 5)
    assert {plan.place[e] for e in (0, 1, 2, 3)} == {Place.CPU}
    slow = CostTable("t", 10, straight(0, 1), straight(0, 0.1), bandwidth={"host_to_hbm": 25.0}, dram=45.0)
    assert FreeTokenSchedule().assign(event(0, (0, 1, 2, 3)), set(), slow).cpu_order == ()
    both = CostTable(
        "t",
        10,
        straight(0, 1),
        straight(0, 0.1),
        contended={"host_to_hbm": 10.0},
        bandwidth={"host_to_hbm": 20.0},
    )
    assert len(FreeTokenSchedule().assign(event(0, (0, 1, 2, 3)), set(), both).cpu_order) == 2
