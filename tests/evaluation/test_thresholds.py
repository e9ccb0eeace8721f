"""HOBBIT's thresholds fitted to a trace."""

from dataclasses import replace

import numpy as np
import pytest

from gangline.core.errors import UsageError
from gangline.core.precision import Precision
from gangline.evaluation.thresholds import fit_to_trace
from gangline.policies.compositions import make_precision, read_composition
from gangline.traces.header import TraceError
from gangline.traces.rows import LayerRows, TokenTable
from gangline.traces.trace import Trace
from traces.made import made_header, made_ids


def made_trace(rng, weights_RLK, experts=12):
    """A trace with these weights."""
    rows, layers, top_k = weights_RLK.shape
    header = made_header(layers, experts, top_k)
    ids_RLK = made_ids(rng, rows, layers, experts, top_k)
    none = np.full(rows, -1, dtype=np.int32)
    number = np.arange(rows, dtype=np.int32)
    tokens = TokenTable(
        none, none, none, 0 * number, number, number, np.ones(rows, np.uint8), np.zeros(rows, bool)
    )
    found = {
        n: LayerRows(ids_RLK[:, n], weights_RK=weights_RLK[:, n].astype(np.float16)) for n in range(layers)
    }
    return Trace(header, (), tokens, found)


@pytest.mark.parametrize(("high", "skip"), [(0.67, 0.03), (0.5, 0.2), (0.6, 0.0)])
def test_the_policy_that_is_written_gives_the_shares(seed, tmp_path, high, skip):
    rng = np.random.default_rng(seed)
    weights_RLK = rng.dirichlet(np.ones(6), size=(400, 3))
    trace = made_trace(rng, weights_RLK)
    fit = fit_to_trace(trace, high, skip)
    assert not fit.notes
    path = tmp_path / "fitted.yaml"
    path.write_text(fit.composition())
    found = read_composition(path)
    assert not found.exact and found.cache == "hobbit"
    rule = make_precision(found).rule
    chosen = [
        p for n in trace.layers for row in trace.layer(n).weights_RK.tolist() for p in rule.by_weight(row)
    ]
    shares = [chosen.count(p) / len(chosen) for p in (Precision.HIGH, Precision.LOW, Precision.SKIP)]
    assert shares == pytest.approx(fit.reached, abs=1e-6)
    assert shares == pytest.approx((high, 1 - high - skip, skip), abs=0.02)


def test_weights_that_are_alike_are_said_to_be(seed):
    trace = made_trace(np.random.default_rng(seed), np.full((20, 2, 2), 0.5))
    fit = fit_to_trace(trace)
    assert (fit.high, fit.reached) == (0.5, (1.0, 0.0, 0.0))
    (note,) = fit.notes
    assert "weigh alike" in note and "nothing changes" in note and "below 0.5 would keep 50%" in note
    half = fit_to_trace(trace, 0.5, 0.0)
    assert half.reached == (0.5, 0.5, 0.0) and not half.notes


def test_empty_slots_are_no_choices(seed):
    weights_RLK = np.zeros((30, 1, 4))
    weights_RLK[..., 0] = 1.0
    assert fit_to_trace(made_trace(np.random.default_rng(seed), weights_RLK)).reached == (1.0, 0.0, 0.0)


def test_refusals(seed):
    rng = np.random.default_rng(seed)
    trace = made_trace(rng, rng.dirichlet(np.ones(3), size=(9, 2)))
    for high, skip in ((0.0, 0.1), (0.9, 0.2), (0.5, -0.1)):
        with pytest.raises(UsageError, match="no more than 1 together"):
            fit_to_trace(trace, high, skip)
    bare = {n: replace(trace.layer(n), weights_RK=None) for n in trace.layers}
    with pytest.raises(TraceError, match="--mode full"):
        fit_to_trace(Trace(trace.header, (), trace.tokens, bare))
    with pytest.raises(UsageError, match="one expert a token"):
        fit_to_trace(made_trace(rng, np.ones((9, 2, 1))))
