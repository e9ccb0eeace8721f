"""Batching: few experts per batch, nobody forgotten, no token lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.policies.batching import (
    ExpertAwareBatching,
    Ready,
    dispatch,
    distinct_experts,
    regroup,
    waste_factor,
)


def test_longest_queue_goes_first_and_fills_the_budget():
    batching = ExpertAwareBatching()
    for request, expert in enumerate([0, 1, 1, 1, 2, 2]):
        batching.add(Ready(request, expert))
    assert [r.request for r in batching.select(4)] == [1, 2, 3, 4]
    assert [r.request for r in batching.select(4)] == [0, 5]
    assert batching.select(4) == []


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 12))
def test_every_token_is_served_once_within_the_budget(experts, budget):
    batching, served = ExpertAwareBatching(), []
    for request, expert in enumerate(experts):
        batching.add(Ready(request, expert))
    while len(batching):
        batch = batching.select(budget)
        assert 0 < len(batch) <= budget
        served += [r.request for r in batch]
    assert sorted(served) == list(range(len(experts)))


@given(st.integers(0, 5))
def test_a_rare_expert_does_not_starve(patience):
    batching = ExpertAwareBatching(patience)
    batching.add(Ready("rare", 9))
    for wave in range(patience + 1):
        for i in range(6):
            batching.add(Ready((wave, i), 0))
        if any(r.request == "rare" for r in batching.select(4)):
            break
    else:
        pytest.fail(f"still waiting after {patience + 1} batches")


def test_expert_aware_batches_hold_fewer_experts(seed):
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, 16, size=512).tolist()
    batching = ExpertAwareBatching(patience=10**6)
    for request, expert in enumerate(experts):
        batching.add(Ready(request, expert))
    aware = []
    while len(batching):
        aware.append(len({r.expert for r in batching.select(8)}))
    plain = [len(set(experts[i : i + 8])) for i in range(0, 512, 8)]
    assert sum(aware) < sum(plain)


paths = st.integers(0, 6).flatmap(
    lambda half: st.lists(
        st.lists(st.booleans(), min_size=12, max_size=12), min_size=2 * half, max_size=2 * half
    )
)


@given(paths)
def test_regrouping_never_loses_and_keeps_every_token(rows):
    path_TX = np.array(rows, dtype=bool).reshape(len(rows), 12)
    half = len(rows) // 2
    first, second = regroup(path_TX)
    assert len(first) == len(second) == half
    assert sorted(first + second) == list(range(2 * half))
    before = distinct_experts(path_TX[:half]) + distinct_experts(path_TX[half:])
    assert distinct_experts(path_TX[first]) + distinct_experts(path_TX[second]) <= before


def test_regrouping_finds_two_kinds_of_tokens(seed):
    order = np.random.default_rng(seed).permutation([0] * 8 + [1] * 8)
    kinds = np.zeros((2, 20), dtype=bool)
    kinds[0, :5], kinds[1, 10:15] = True, True
    first, second = regroup(kinds[order])
    assert len(set(order[first].tolist())) == len(set(order[second].tolist())) == 1


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 4))
def test_dynamic_gating_equals_the_dense_reference(seed, tokens, top_k):
    rng = np.random.default_rng(seed)
    experts = 6
    ids_TK = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    w_TK = rng.random((tokens, top_k))
    x_TD, w_EDD = rng.normal(size=(tokens, 3)), rng.normal(size=(experts, 3, 3))
    dense_TD = sum(
        w_TK[:, k, None] * np.einsum("td,tdf->tf", x_TD, w_EDD[ids_TK[:, k]]) for k in range(top_k)
    )
    plan, out_TD, start = dispatch(ids_TK, experts), np.zeros((tokens, 3)), 0
    for expert, count in enumerate(plan.count_E):
        pairs = slice(start, start + count)
        token_N, choice_N = plan.token_P[pairs], plan.choice_P[pairs]
        assert (ids_TK[token_N, choice_N] == expert).all()
        np.add.at(out_TD, token_N, w_TK[token_N, choice_N, None] * (x_TD[token_N] @ w_EDD[expert]))
        start += count
    assert start == tokens * top_k
    np.testing.assert_allclose(out_TD, dense_TD, atol=1e-12)
    assert sum(plan.sizes([0, 0, 1, 1, 2, 2], 3)) == tokens * top_k


def test_waste_of_static_gating():
    assert waste_factor(512, 0.05, 2) == pytest.approx(12.8)
    assert waste_factor(128, 1.0, 2) == pytest.approx(64)
