"""A predictor that is mostly wrong is not acted on, until it is right again."""

import numpy as np
import pytest

from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.next_gate import NextGate
from gangline.policies.predictors.track_record import MEMORY, RETRY, TrackRecord

LAYERS, EXPERTS = 4, 6


def event(step, layer, experts, scores_E=None):
    detail = None if scores_E is None else RoutingDetail(gate_input_TD=np.array([scores_E]))
    return RoutingEvent(step, layer, "decode", 1, tuple(experts), (1,) * len(experts), detail)


def test_precision_is_a_running_mean_of_the_next_layer_alone():
    record = TrackRecord(2, 0.97)
    said = [
        Forecast(1, 1, (3, 4, 5), (0.5, 0.3, 0.2), 1, "test"),
        Forecast(1, 2, (0, 1), (0.6, 0.4), 2, "test"),
    ]
    record.note(said)
    record.judge(event(1, 2, (2, 3)))  # two layers ahead: not counted
    assert record.precision == 1
    assert record.earned
    record.judge(event(1, 1, (4, 5)))  # one of the first two
    assert not record.earned
    assert record.precision == pytest.approx(1 - MEMORY / 2)
    record.judge(event(1, 1, (0, 2)))  # judged already
    record.note(said)
    record.judge(event(2, 1, (0, 2)))  # said of another pass
    assert record.precision == pytest.approx(1 - MEMORY / 2)


def heard(predictor, used_by_pass, first=0):
    """Forecasts of each event where gates score what they are given: always experts 0 and 1."""
    scores = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    return [
        [len(predictor.after_gate(event(number, layer, used, scores))) for layer in range(LAYERS)]
        for number, used in enumerate(used_by_pass, first)
    ]


def next_gate():
    return NextGate([lambda x: x] * LAYERS, 2, 2, least_precision=0.5)


def test_next_gate_is_heard_while_it_is_right():
    wrong = 12
    told = heard(next_gate(), [(0, 1)] * 3 + [(4, 5)] * wrong + [(0, 1)] * 60)
    full = [2, 2, 1, 0]
    assert told[:3] == [full] * 3
    lost = next(number for number, said in enumerate(told) if said != full)
    assert 3 < lost < 3 + wrong
    silent = told[lost + 1 : lost + 1 + RETRY]
    assert len(silent) == RETRY and not any(map(any, silent))
    assert told[-1] == full


def test_the_number_of_the_first_pass_does_not_matter():
    """A live model may have run before; a replay begins at 0."""
    passes = [(0, 1)] * 3 + [(4, 5)] * 12 + [(0, 1)] * 60
    told = heard(next_gate(), passes)
    assert all(heard(next_gate(), passes, first) == told for first in range(1, RETRY + 1))


def test_without_a_bound_it_is_always_heard():
    told = heard(NextGate([lambda x: x] * LAYERS, 1, 2), [(4, 5)] * 20)
    assert told == [[1, 1, 1, 0]] * 20
