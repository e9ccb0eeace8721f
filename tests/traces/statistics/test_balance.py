"""Load, entropy, co-activation, transitions, repetition: golden values and nulls."""

import numpy as np
import pytest

from gangline.traces.rows import LayerRows
from gangline.traces.statistics.coactivation import coactivation, lift, pair_counts, shuffle_slots
from gangline.traces.statistics.load import expert_load, gini, violation_by_document
from gangline.traces.statistics.membership import counted, first_choice, runs, used
from gangline.traces.statistics.phases import correlation, phases
from gangline.traces.statistics.repetition import repetition
from gangline.traces.statistics.router_entropy import router_entropy
from gangline.traces.statistics.spread import discoveries, jensen_shannon
from gangline.traces.statistics.transition import transition
from traces.made import made_ids


def random_rows(rng, rows=600, experts=12, top_k=3):
    return LayerRows(made_ids(rng, rows, 1, experts, top_k)[:, 0])


def test_gini_of_the_card():
    assert gini([0, 0, 0, 40]) == pytest.approx(0.75)
    assert gini([7, 7, 7]) == pytest.approx(0)


def test_even_load(seed):
    load = expert_load(np.full(8, 100), np.random.default_rng(seed))
    assert (load.max_violation, load.variation, load.gini) == (0, 0, pytest.approx(0))
    assert load.entropy == pytest.approx(1) and load.dead == load.cold == 0
    assert load.max_violation_null.p_value == 1


def test_one_expert_has_all(seed):
    load = expert_load(np.array([0, 0, 40, 0]), np.random.default_rng(seed))
    assert load.max_violation == 3 and load.entropy == pytest.approx(0) and load.dead == load.cold == 3
    assert load.max_violation_null.p_value < 0.01 and load.dead_null < 0.1


def test_few_tokens_show_dead_experts_by_chance(seed):
    load = expert_load(np.eye(256, dtype=int)[0] * 100, np.random.default_rng(seed))
    assert load.dead_null == pytest.approx(256 * (1 - 1 / 256) ** 100, rel=0.05)


def test_uniform_choices_are_within_the_null(seed):
    rng = np.random.default_rng(seed)
    within = 0
    for _ in range(20):
        null = expert_load(rng.multinomial(2000, np.full(16, 1 / 16)), rng).max_violation_null
        within += null.p_value > 0.01
    assert within >= 14  # one in a hundred is outside by chance


def test_violation_within_documents_is_not_that_of_the_corpus():
    used_RN = np.repeat(np.eye(4, dtype=bool), 10, axis=0)
    doc_R = np.repeat(np.arange(4), 10)
    assert violation_by_document(used_RN, doc_R) == 3  # each document uses one expert; together they are even


def test_membership_and_empty_slots():
    rows = LayerRows(
        np.array([[2, 0], [1, 3]], dtype=np.uint8), np.array([[True, False], [True, True]]), None
    )
    assert used(rows, 4).tolist() == [[False, False, True, False], [False, True, False, True]]
    weighted = LayerRows(rows.ids_RK, rows.keep_RK, np.array([[0.1, 0.9], [0.2, 0.8]], dtype=np.float16))
    assert first_choice(weighted).tolist() == [2, 3] and first_choice(rows).tolist() == [2, 1]


def test_counted_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    used_RN, group_R = rng.random((50, 6)) < 0.3, rng.integers(4, size=50)
    expected = [used_RN[group_R == g].sum(axis=0).tolist() for g in range(4)]
    assert counted(used_RN, group_R, 4).tolist() == expected
    assert [r.stop - r.start for r in runs(np.array([3, 3, 1, 1, 1, 3]))] == [2, 3, 1]


def test_router_entropy_between_its_ends():
    used_RN = np.zeros((5, 4), dtype=bool)
    used_RN[:, :2] = True
    uniform = router_entropy(np.full((5, 4), 0.25), used_RN)
    assert (uniform.entropy, uniform.first, uniform.kept) == pytest.approx((1, 0.25, 0.5))
    sure = router_entropy(np.eye(4)[[0] * 5], used_RN)
    assert (sure.entropy, sure.first, sure.kept) == pytest.approx((0, 1, 1))


def test_shuffling_slots_keeps_loads_and_tokens(seed):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng)
    keep_RK = rng.random(rows.ids_RK.shape) < 0.8
    before = used(LayerRows(rows.ids_RK, keep_RK), 12)
    after = used(LayerRows(shuffle_slots(rows.ids_RK, keep_RK, 12, rng), keep_RK), 12)
    assert (before.sum(axis=0) == after.sum(axis=0)).all() and (before.sum(axis=1) == after.sum(axis=1)).all()
    assert (before != after).mean() > 0.1


def test_random_routing_has_no_co_activation(seed):
    rng = np.random.default_rng(seed)
    found = coactivation(random_rows(rng), 12, rng)
    assert found.excess < 1.5 * found.null.high


def test_planted_pairs_are_found(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(6, size=800)
    second = np.where(rng.random(800) < 0.6, first + 6, rng.integers(6, 12, size=800))
    found = coactivation(LayerRows(np.stack([first, second], axis=1)), 12, rng)
    assert found.excess > 3 * found.null.high
    assert {(pair.first, pair.second) for pair in found.pairs[:6]} == {(n, n + 6) for n in range(6)}
    assert all(pair.lift > 2 and pair.deviations > 5 for pair in found.pairs[:6])


def test_lift_by_hand():
    together = pair_counts(np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=bool))
    assert lift(together, 4)[0, 1] == pytest.approx(2 * 4 / (3 * 2)) and np.isnan(lift(together, 4)[0, 2])


def test_transition_of_a_copied_layer_tells_all(seed):
    rng = np.random.default_rng(seed)
    used_RN = np.eye(8, dtype=bool)[rng.integers(8, size=2000)]
    copied = transition(used_RN, used_RN[:, rng.permutation(8)], rng)
    assert copied.share == pytest.approx(1) and copied.information == pytest.approx(3, abs=0.05)
    other = transition(used_RN, np.eye(8, dtype=bool)[rng.integers(8, size=2000)], rng)
    assert other.information < 0.05 and other.information < other.null.high * 2


def test_repetition_by_chance_and_by_runs(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(8, size=4000)
    doc = np.repeat([0, 1], 2000)
    random = repetition(first, np.eye(8, dtype=bool)[first], doc, rng)
    assert random.first == pytest.approx(random.first_chance, abs=0.03) == pytest.approx(1 / 8, abs=0.03)
    runs_of_ten = np.repeat(rng.integers(8, size=400), 10)
    assert repetition(first[:2], np.eye(8, dtype=bool)[first[:2]], np.arange(2), rng) is None
    found = repetition(runs_of_ten, np.eye(8, dtype=bool)[runs_of_ten], doc, rng)
    assert found.first == pytest.approx(0.9 + 0.1 / 8, abs=0.03) and found.any == found.overlap == found.first
    assert found.overlap_chance == pytest.approx(1 / 8, abs=0.05)


def test_phases_of_the_same_loads_reach_the_ceiling(seed):
    rng = np.random.default_rng(seed)
    share = np.arange(1, 9) / 36
    used_RN = np.eye(8, dtype=bool)[rng.choice(8, size=4000, p=share)]
    found = phases(used_RN, np.arange(4000) >= 2000, rng)
    assert found.correlation > 0.8 and found.ceiling > 0.8
    assert correlation(np.ones(4), np.arange(4)) is None


def test_divergence_of_the_card_and_discoveries():
    p, q = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.1, 0.7, 0.1, 0.1])
    assert jensen_shannon(p, q) == pytest.approx(0.25310, abs=1e-5)
    found = discoveries(np.array([0.001, 0.9, 0.012, 0.04, 0.5]))
    assert found.tolist() == [True, False, True, False, False]
