"""What routing has to do with content: domains, tokens, positions, languages, checkpoints; and outputs."""

import numpy as np
import pytest

from gangline.traces.rows import LayerRows
from gangline.traces.statistics.alignment import alignment, normalised_divergence
from gangline.traces.statistics.context_independence import context_independence
from gangline.traces.statistics.hidden_control import hidden_control
from gangline.traces.statistics.membership import used
from gangline.traces.statistics.position import dropped, position_effects
from gangline.traces.statistics.saturation import saturation
from gangline.traces.statistics.specialisation import matched, specialisation
from gangline.traces.statistics.super_experts import super_experts
from gangline.traces.statistics.vocabulary import top_tokens, vocabulary
from traces.made import made_ids

N, K = 8, 2


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def random_used(rng, rows):
    return used(LayerRows(made_ids(rng, rows, 1, N, K)[:, 0]), N)


def hashed(token_R):
    """A router that looks at the token id only."""
    return used(LayerRows(np.stack([token_R % N, (token_R * 3 + 1) % N], axis=1)), N)


def test_random_routing_has_no_domains(rng):
    doc = np.repeat(np.arange(20), 60)
    found = specialisation(random_used(rng, 1200), doc, np.arange(20) % 2, rng, draws=200)
    assert found.divergence < 0.01 and found.divergence < 3 * found.null.high
    assert np.allclose(np.mean(found.shares), K / N)


def test_documents_not_tokens_are_what_varies(rng):
    """Documents that differ, but not by group, are no affinity, however many tokens they have."""
    favourite = rng.permutation(12) % N
    doc = np.repeat(np.arange(12), 300)
    used_RN = np.eye(N, dtype=bool)[favourite[doc]]
    found = specialisation(used_RN, doc, np.arange(12) % 2, rng, draws=100)
    same = specialisation(used_RN[rng.permutation(3600)], doc, np.arange(12) % 2, rng, draws=100)
    assert found.null.high > 0.2 > 0.02 > same.null.high


def test_planted_domains_are_found(rng):
    group = np.arange(20) % 2
    doc = np.repeat(np.arange(20), 60)
    used_RN = np.eye(N, dtype=bool)[rng.integers(4, size=1200) + 4 * group[doc]]
    found = specialisation(used_RN, doc, group, rng, draws=200)
    assert found.divergence == pytest.approx(1) and found.null.p_value < 0.01
    assert found.variation == pytest.approx(1) and found.low == pytest.approx(1)


def test_a_difference_of_vocabulary_is_not_one_of_domain(rng):
    token = np.concatenate([rng.integers(0, 30, size=2000), rng.integers(15, 45, size=2000)])
    group = np.repeat([0, 1], 2000)
    by_token = np.eye(N, dtype=bool)[token // 6]
    plain = specialisation(by_token, np.arange(4000) // 100, np.arange(40) // 20, rng, draws=100)
    fair = matched(by_token, token, group, rng)
    assert plain.null.p_value < 0.02 and fair.tokens == 15
    assert fair.divergence == pytest.approx(0, abs=1e-9)


def test_matched_finds_what_the_token_does_not_explain(rng):
    token, group = rng.integers(20, size=2000), rng.integers(2, size=2000)
    found = matched(np.eye(N, dtype=bool)[rng.integers(4, size=2000) + 4 * group], token, group, rng)
    assert found.divergence > 0.9 > 10 * found.null.high
    chance = matched(random_used(rng, 2000), token, group, rng)
    assert chance.divergence < 0.02
    assert matched(random_used(rng, 10), np.arange(10), np.arange(10) % 2, rng) is None


def test_vocabulary_of_a_hash_router_and_of_chance(rng):
    token = rng.integers(40, size=3000)
    assert vocabulary(hashed(token), token, rng).specialisation == 1
    chance = vocabulary(random_used(rng, 3000), token, rng)
    assert chance.specialisation > K / N  # a maximum is above its mean
    assert chance.specialisation == pytest.approx(chance.null.mean, abs=0.05)
    assert vocabulary(random_used(rng, 5), np.arange(5), rng) is None


def test_top_tokens_of_a_hash_router(rng):
    token = np.repeat(np.arange(8), 20)
    used_RN = np.eye(N, dtype=bool)[token]
    assert [[t.token for t in top] for top in top_tokens(used_RN, token)] == [[n] for n in range(8)]
    assert top_tokens(used_RN, token)[3][0].lift == pytest.approx(8)


def test_context_independence_between_its_ends(rng):
    token = rng.integers(30, size=2000)
    assert context_independence(hashed(token), token, rng).explained == pytest.approx(1)
    chance = context_independence(random_used(rng, 2000), token, rng)
    assert abs(chance.explained) < 0.02
    half = np.where(rng.random((2000, 1)) < 0.5, hashed(token), random_used(rng, 2000))
    assert 0.1 < context_independence(half, token, rng).explained < 0.5


def test_rare_tokens_do_not_look_explained(rng):
    """With two occurrences each, an estimate that compares a token with itself would say one half."""
    token = np.repeat(np.arange(500), 2)
    assert abs(context_independence(random_used(rng, 1000), token, rng).explained) < 0.1
    assert context_independence(random_used(rng, 9), np.arange(9), rng) is None
    assert context_independence(hashed(np.zeros(9, dtype=int)), np.zeros(9, dtype=int), rng) is None


def test_context_independence_equals_all_pairs(rng):
    token = rng.integers(6, size=40)
    used_RN = random_used(rng, 40)
    distance = (used_RN[:, None] != used_RN[None]).sum(axis=2)
    apart = ~np.eye(40, dtype=bool)
    same = (token[:, None] == token) & apart
    rows = same.any(axis=1)
    within = np.mean([distance[r][same[r]].mean() for r in np.flatnonzero(rows)])
    found = context_independence(used_RN, token, rng)
    assert found.explained == pytest.approx(1 - within / distance[apart].mean())


def test_saturation_between_its_ends(rng):
    token = rng.integers(50, size=4000)
    last = random_used(rng, 4000)
    first = last.argmax(axis=1)
    same = saturation(last, last, first, first, token)
    assert (same.saturation, same.chance, same.churn) == (1, K / N, 0)
    other = random_used(rng, 4000)
    found = saturation(other, last, other.argmax(axis=1), first, token)
    assert found.saturation == pytest.approx(found.chance, abs=0.04) and found.churn > 0.1


def test_a_capacity_of_all_drops_nothing_and_order_drops_the_end(rng):
    while True:  # until no document fills an expert (12 tokens) within its first quarter
        rows = LayerRows(made_ids(rng, 640, 1, N, K)[:, 0])
        if used(rows, N).reshape(10, 64, N)[:, :16].sum(axis=1).max() <= 12:
            break
    doc = np.repeat(np.arange(10), 64)
    assert dropped(rows, doc, N, N / K).sum() == 0
    lost = dropped(rows, doc, N, 0.7).reshape(10, 64).sum(axis=0)
    quarters = lost.reshape(4, 16).sum(axis=1)
    assert (np.diff(quarters) >= 0).all() and quarters[0] == 0 and quarters[3] > 0
    spread = dropped(rows, doc, N, 0.7, rng).reshape(10, 4, 16).sum(axis=(0, 2))
    assert spread.sum() == lost.sum() and spread.min() > 0.25 * spread.max()


def test_position_effects_find_a_planted_sink(rng):
    rows = LayerRows(made_ids(rng, 640, 1, N, K)[:, 0])
    position = np.tile(np.arange(64), 10)
    rows.ids_RK[position == 0] = [1, 2]
    starts = np.array([0, 1, 32])
    doc = np.repeat(np.arange(10), 64)
    found = position_effects(rows, used(rows, N), position, doc, starts, rng)
    assert found.tokens == (10, 310, 320) and found.distance[0] > 0.6
    assert found.distance[1] < 0.25 and found.distance_chance[0] < 0.6
    assert found.dropped[2] > found.dropped[1] and found.dropped_chance[2] < found.dropped[2]


def test_divergence_of_the_card():
    p, q = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.1, 0.7, 0.1, 0.1])
    assert normalised_divergence(p, q) == pytest.approx(0.56769, abs=1e-5)
    assert normalised_divergence(np.eye(4)[0], np.eye(4)[1]) == pytest.approx(0.5)
    assert normalised_divergence(np.full(4, 0.25), np.full(4, 0.25)) == 0 == normalised_divergence(p, p)


def test_alignment_of_languages(rng):
    sentence = np.tile(np.repeat(np.arange(30), 40), 2)
    second = np.repeat([False, True], 1200)
    base = rng.dirichlet(np.ones(N), size=30)
    noise = rng.dirichlet(np.full(N, 5), size=2400)
    same = alignment((base[sentence] + noise) / 2, sentence, second, rng, draws=100)
    assert same.divergence < 0.05 and same.low <= same.divergence <= same.high and same.sentences == 30
    other = np.where(second[:, None], np.roll(base, 1, axis=0)[sentence], base[sentence])
    apart = alignment((other + noise) / 2, sentence, second, rng, draws=100)
    assert apart.divergence > 2 * same.divergence and apart.divergence > apart.within


def test_planted_super_expert_is_found_alone(rng):
    peaks = [np.abs(rng.normal(1, 0.1, size=16)) for _ in range(8)]
    peaks[1][5] = 1000
    found = super_experts(peaks)
    assert [(e.layer, e.expert) for e in found.found] == [(1, 5)] and found.layers == 6
    assert found.tenth_threshold == 100


def test_super_experts_of_the_last_quarter_do_not_count(rng):
    peaks = [np.abs(rng.normal(1, 0.1, size=16)) for _ in range(8)]
    peaks[7][3] = 1000
    assert all(e.layer < 6 for e in super_experts(peaks).found)
    dense_first = super_experts(peaks[:2], depth=[6, 7], decoder_layers=8)
    assert dense_first is None
    shared = super_experts(peaks, shared=[np.nan, 500] + [np.nan] * 6)
    assert [(e.layer, e.expert) for e in shared.found] == [(1, -1)]
    assert super_experts([np.full(4, np.nan)] * 4) is None


def test_hidden_control_explains_what_follows_from_inputs(rng):
    group = rng.integers(2, size=400)
    centre = np.eye(16)[group] * 16
    inputs = (centre + rng.normal(size=(400, 16))).astype(np.float16)
    follows = np.eye(N, dtype=bool)[group]
    found = hidden_control(follows, inputs, group, rng)
    assert found.explained > 0.8 and found.same == 1 and found.other == 0
    own = hidden_control(follows, rng.normal(size=(400, 16)), group, rng)
    assert own.explained < 0.01 and own.same_residual > 0.4 > -0.4 > own.other_residual
    assert hidden_control(follows, inputs, np.zeros(400), rng).other is None
