"""A predictor that is mostly wrong is not acted on, until it is right again."""

import numpy as np
import pytest

from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.policies.predictors.next_gate import RETRY, NextGate
from gangline.policies.predictors.track_record import MEMORY, TrackRecord

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


def test_next_gate_is_heard_while_it_is_right():
    """Gates that score what they are given: the forecast is the two largest entries of the input."""
    predictor = NextGate([lambda x: x] * LAYERS, 2, 2, least_precision=0.5)
    scores = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])

    def step(number, used):
        return [len(predictor.after_gate(event(number, layer, used, scores))) for layer in range(LAYERS)]

    full = [2, 2, 1, 0]
    assert all(step(number, (0, 1)) == full for number in range(3))
    number = 3
    while any(step(number, (4, 5))):
        number += 1
    assert 3 < number < 12
    later = range(number + 1, number + 60)
    told = {n: step(n, (0, 1)) for n in later}
    compared = next(n for n in later if n % RETRY == 0)
    assert not any(any(told[n]) for n in later if n < compared)
    assert any(any(told[n]) for n in (compared, compared + 1)) and told[later[-1]] == full


def test_without_a_bound_it_is_always_heard():
    predictor = NextGate([lambda x: x] * LAYERS, 1, 2)
    scores = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    heard = [predictor.after_gate(event(n, layer, (4, 5), scores)) for n in range(20) for layer in (0, 1)]
    assert all(heard)
