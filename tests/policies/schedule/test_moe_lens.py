"""MoE-Lens: the worked example, the limits, and the simulated schedule against the closed form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.policies.schedule.moe_lens import (
    LensBound,
    LensMachine,
    LensSchedule,
    effective_kv,
    pme,
    saturation_tokens,
)


def test_worked_example():
    """Mixtral, 94 GB at 19.5 GB/s, 70 GB of KV at 128 KiB a token."""
    bound = LensBound(94e9, 19.5e9, 70e9 / (128 * 1024), gpu=1e9)
    assert bound.delta == pytest.approx(4.82, abs=0.005)
    assert bound.kv_tokens == pytest.approx(534e3, rel=1e-3)
    assert pme(98, 32) == pytest.approx(0.0356, abs=5e-5)
    assert pme(98, 256) == pytest.approx(0.0061, abs=5e-5)
    assert bound.tokens_per_second(98, 32) == pytest.approx(3.9e3, rel=0.02)


@given(st.integers(1, 2000), st.integers(1, 500))
def test_laws_of_the_bound(prompt, generated):
    assert pme(prompt, generated + 1) < pme(prompt, generated)
    bound = LensBound(1e9, 1e9, 1000.0, gpu=1e12)
    twice = LensBound(1e9, 1e9, 2000.0, gpu=1e12)
    assert twice.tokens_per_second(prompt, generated) == pytest.approx(
        2 * bound.tokens_per_second(prompt, generated)
    )
    assert LensBound(1e9, 1e9, 1e30, gpu=5.0).tokens_per_second(prompt, generated) == 5.0
    assert bound.tokens_per_second(prompt, 0) == bound.gpu
    assert 1000 < effective_kv(prompt, generated, 1000.0) < 2000


def test_saturation():
    assert saturation_tokens(2e9, 20e9, 100e12, 1e9) == pytest.approx(10_000)


@pytest.mark.parametrize(
    ("prompt", "generated", "within"), [(64, 16, 0.1), (100, 32, 0.1), (32, 32, 0.1), (16, 64, 0.15)]
)
def test_simulated_steps_reproduce_the_closed_form(prompt, generated, within):
    """Where generation is longer than the prompt the first burst keeps the occupancy swinging."""
    kv_tokens = 60_000
    machine = LensMachine(
        delta=1.0,
        gpu=lambda tokens: tokens / 1e9,
        attention=lambda held: held / 1e9,
        kv_blocks=kv_tokens,
        block=1,
        most_tokens=int(pme(prompt, generated) * kv_tokens),
        most_running=10**6,
    )
    run = LensSchedule(machine).simulate([(prompt, generated)] * 10_000)
    assert run.tokens >= 10_000 * (prompt + generated)
    steady = run.per_step[len(run.per_step) // 4 : len(run.per_step) * 3 // 4]
    bound = LensBound(1.0, 1.0, kv_tokens, gpu=1e9).tokens_per_second(prompt, generated)
    assert sum(steady) / len(steady) == pytest.approx(bound, rel=within)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(30, 60),
)
def test_schedule_serves_everyone_within_the_cache(requests, block, room):
    machine = LensMachine(1.0, lambda n: 0.1 * n, lambda n: 0.0, -(-room // block) + 1, block, 24, 4)
    schedule = LensSchedule(machine)
    run = schedule.simulate(requests)
    wanted = sum(p + g for p, g in requests)
    assert run.tokens >= wanted
    assert (run.tokens == wanted) == (run.preempted == 0)
    assert run.seconds >= run.steps


def test_a_request_that_never_fits_is_refused():
    machine = LensMachine(1.0, float, float, 4, 4, 100, 4)
    with pytest.raises(UsageError, match=r"10 \+ 10 tokens does not fit into 4 KV blocks"):
        LensSchedule(machine).simulate([(10, 10)])
