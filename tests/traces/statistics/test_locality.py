"""SRP and SCH: the vectors of the card, and how they stand to caches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.traces.simulator import belady
from gangline.traces.statistics import segment_cache
from gangline.traces.statistics.consistency import segment_routing, window_counts
from traces.made import made_events, made_ids


def srp(used_RN, window, doc_R=None, **more):
    used_RN = np.asarray(used_RN, dtype=bool)
    used_RN = used_RN[:, None] if used_RN.ndim == 1 else used_RN
    doc_R = np.zeros(len(used_RN), dtype=int) if doc_R is None else doc_R
    return segment_routing(window_counts(used_RN, doc_R, window)[0], **more)


def test_the_sequence_of_the_card():
    found = srp([1, 1, 1, 0, 0, 0, 1, 0], 2)
    assert found.srp == pytest.approx(14 / 17) and found.rho_hat == pytest.approx(10 / 7) and found.alpha == 1


def test_constant_and_alternating():
    assert srp(np.ones(40), 4).srp == srp(np.ones(40), 4).rho_hat == 1
    assert srp(np.arange(41) % 2, 2).srp == pytest.approx(2 / 3)


def test_blocks_of_64():
    used = np.tile(np.repeat([1, 0], 64), 200)
    assert srp(used, 16).srp == pytest.approx(0.939, abs=0.002)


def test_random_routing_is_above_the_closed_floor(seed):
    used = np.random.default_rng(seed).random(200_000) < 0.125
    assert srp(used, 16).srp == pytest.approx(0.317, abs=0.01)
    assert srp(used, 256).srp < 0.25  # the floor 2q / (1 + q) = 0.222 is reached for large m only


def test_counts_are_pooled_before_the_maximum(seed):
    rng = np.random.default_rng(seed)
    used = np.stack([np.ones(200, dtype=bool), rng.random(200) < 0.1], axis=1)
    by_document, by_expert = window_counts(used, np.zeros(200, dtype=int), 8)
    single = [segment_routing(counts[None]).srp for counts in by_expert]
    pooled = segment_routing(by_document).srp
    f1 = []
    for alpha in range(1, 9):
        called = by_expert[:, alpha:].sum()
        found = (by_expert[:, alpha:] * np.arange(alpha, 9)).sum()
        f1.append(2 * found / (8 * called + (by_expert * np.arange(9)).sum()))
    assert pooled == pytest.approx(max(f1)) and pooled != pytest.approx(np.mean(single), abs=1e-3)


def test_windows_do_not_join_documents(seed):
    used = np.random.default_rng(seed).random((60, 3)) < 0.4
    doc = np.repeat([4, 2, 7], [30, 5, 25])
    by_document, by_expert = window_counts(used, doc, 8)
    parts = [window_counts(used[a:b], np.zeros(b - a, dtype=int), 8)[0][0] for a, b in ((0, 30), (35, 60))]
    assert by_document.tolist() == [parts[0].tolist(), [0] * 9, parts[1].tolist()]
    assert by_expert.sum(axis=0).tolist() == (parts[0] + parts[1]).tolist()
    assert srp(used[:5], 8) is None


def test_interval_holds_the_value(seed):
    rng = np.random.default_rng(seed)
    used = np.repeat(rng.random((60, 4)) < 0.4, 10, axis=0)
    found = srp(used, 16, np.repeat(np.arange(12), 50), rng=rng, draws=200)
    assert found.low <= found.srp <= found.high and found.high - found.low < 0.5


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_sliding_is_never_above_belady(seed, window, extra):
    rng = np.random.default_rng(seed)
    ids = made_ids(rng, 40, 1, 7, 2)[:, 0]
    used_LRN = np.zeros((1, 40, 7), dtype=bool)
    np.put_along_axis(used_LRN[0], ids, True, axis=1)
    slots = 1 + extra
    hits, uses = segment_cache.sliding(used_LRN, np.zeros(40, dtype=int), window, slots)
    events = made_events([[row.tolist()] for row in ids])
    # First touches in free slots count as hits here, as in the released code; Belady's cache starts cold.
    assert uses == 80 and hits <= belady(events, slots).hits + slots


def test_sliding_with_room_for_all_always_hits(seed):
    used = np.random.default_rng(seed).random((3, 30, 5)) < 0.3
    assert len(set(segment_cache.sliding(used, np.zeros(30, dtype=int), 4, 5))) == 1


def test_sliding_evicts_what_the_window_uses_least():
    # Two slots: 0 and 1 fill them, then 2 comes. The next two tokens use 0: so 1 leaves.
    sequence = [0, 1, 2, 0, 0, 1]
    used = np.eye(3, dtype=bool)[sequence][None]
    hits, uses = segment_cache.sliding(used, np.zeros(6, dtype=int), 2, 2)
    assert (hits, uses) == (4, 6)  # two first touches, then 0 twice


def test_windows_take_the_most_used(seed):
    used = np.eye(3, dtype=bool)[[0, 0, 1, 2]]
    # windows of 3: {0: 2, 1: 1} and {0: 1, 1: 1, 2: 1}; the best one expert has 2 and 1 of 6 uses.
    assert segment_cache.windows(used, np.zeros(4, dtype=int), 3, 1) == (3, 6)
    assert segment_cache.windows(used, np.zeros(4, dtype=int), 3, 9) == (6, 6)
    assert segment_cache.windows(used, np.array([0, 0, 1, 1]), 3, 1) == (0, 0)
