"""HOBBIT's rule of precision."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.precision import Precision
from gangline.policies.precision import HobbitPrecision
from gangline.policies.precision.hobbit import fit_thresholds, unimportance

HIGH, LOW, SKIP = Precision.HIGH, Precision.LOW, Precision.SKIP


def test_card_vector():
    assert HobbitPrecision().by_weight([0.5, 0.3, 0.15, 0.05]) == [HIGH, HIGH, LOW, SKIP]
    assert HobbitPrecision().by_weight([0.05, 0.15, 0.3, 0.5]) == [SKIP, LOW, HIGH, HIGH]
    assert HobbitPrecision().by_weight([1.0, 0.6, 0.3, 0.1]) == [HIGH, HIGH, LOW, SKIP]


weights = st.lists(st.floats(0.001, 1), min_size=1, max_size=8)


@given(weights, st.floats(0, 1), st.floats(0, 1))
def test_laws(w, a, b):
    """The first is high, more weight is never treated worse, and T1 = 1 is exact."""
    chosen = HobbitPrecision(min(a, b), max(a, b)).by_weight(w)
    assert chosen[int(np.argmax(w))] is HIGH
    order = np.argsort(-np.array(w), kind="stable")
    assert [chosen[i] for i in order] == sorted(chosen, reverse=True)
    assert set(HobbitPrecision(1, 1).by_weight(w)) == {HIGH}
    assert HobbitPrecision(1, 1).exact and not HobbitPrecision().exact


def test_event_takes_the_best_wish_and_a_better_resident():
    detail = RoutingDetail(ids_TK=np.array([[3, 1], [1, 2]]), weights_TK=np.array([[0.95, 0.05], [0.7, 0.3]]))
    event = RoutingEvent(0, 0, "prefill", 2, (1, 2, 3), (2, 1, 1), detail)
    policy = HobbitPrecision(0.6, 0.9)
    assert policy.choose(event, {}) == {1: HIGH, 2: LOW, 3: HIGH}
    assert policy.choose(event, {2: HIGH}) == {1: HIGH, 2: HIGH, 3: HIGH}
    with pytest.raises(UsageError, match="ids and weights"):
        policy.choose(RoutingEvent(0, 0, "decode", 1, (1,), (1,)), {})
    with pytest.raises(UsageError, match=r"T1 0\.9 and T2 0\.6"):
        HobbitPrecision(0.9, 0.6)


def test_skipped_weights_are_kept_or_spread():
    kept = [True, True, False]
    assert HobbitPrecision().reweighted([0.5, 0.3, 0.2], kept) == pytest.approx([0.5, 0.3, 0])
    spread = HobbitPrecision(renormalise=True).reweighted([0.5, 0.3, 0.2], kept)
    assert spread == pytest.approx([0.625, 0.375, 0])


def test_fitted_thresholds_give_the_shares(seed):
    w_TK = np.random.default_rng(seed).dirichlet(np.ones(4), size=2000)
    t1, t2 = fit_thresholds(unimportance(w_TK), high=0.67, skip=0.03)
    chosen = [p for row in w_TK.tolist() for p in HobbitPrecision(t1, t2).by_weight(row)]
    assert chosen.count(HIGH) / len(chosen) == pytest.approx(0.67, abs=0.02)
    assert chosen.count(SKIP) / len(chosen) == pytest.approx(0.03, abs=0.01)
