import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gangline.evaluation.compare import (
    TOLERANCE,
    agreement,
    bit_equal,
    first_offence,
    logit_tolerance,
)
from gangline.evaluation.generation import Generation


def generation(seed, rows=2, length=5, vocabulary=11):
    logits = torch.randn(rows, length, vocabulary, generator=torch.Generator().manual_seed(seed))
    return Generation(logits.argmax(-1), logits)


def changed(original, row, position, token):
    tokens, logits = original.tokens_BN.clone(), original.logits_BNV.clone()
    tokens[row, position] = token
    return Generation(tokens, logits)


def test_equal_generations(seed):
    one, two = generation(seed), generation(seed)
    assert bit_equal(one, two)
    found = agreement(one, two)
    assert (found.tokens_equal, found.max_abs_logit_diff, found.divergences) == (True, 0.0, ())


@given(st.integers(0, 2**32), st.integers(0, 1), st.integers(0, 4), st.integers(0, 10))
def test_one_bit_of_one_logit_is_seen(seed, row, position, token):
    one, two = generation(seed), generation(seed)
    value = two.logits_BNV[row, position, token]
    two.logits_BNV[row, position, token] = torch.nextafter(value, torch.tensor(torch.inf))
    assert not bit_equal(one, two)
    assert agreement(one, two).max_abs_logit_diff > 0


def test_not_a_number_is_never_equal(seed):
    one = generation(seed)
    one.logits_BNV[0, 0, 0] = torch.nan
    assert not bit_equal(one, one)


@given(st.integers(0, 2**32), st.integers(0, 1), st.integers(0, 4))
def test_a_differing_token_is_named_with_its_margin(seed, row, position):
    reference = generation(seed)
    best = int(reference.tokens_BN[row, position])
    other = (best + 1) % 11
    found = agreement(changed(reference, row, position, other), reference)
    (item,) = found.divergences
    assert (item.row, item.position, item.reference_token, item.token) == (row, position, best, other)
    logits = reference.logits_BNV[row, position]
    assert item.margin == pytest.approx(float(logits[best] - logits[other]))
    assert not found.tokens_equal


def test_after_the_first_difference_nothing_is_compared(seed):
    reference = generation(seed)
    ours = changed(reference, 0, 2, int(reference.tokens_BN[0, 2] + 1) % 11)
    ours.logits_BNV[0, 2, 0] += 0.5
    ours.logits_BNV[0, 3:] += 100.0
    assert agreement(ours, reference).max_abs_logit_diff == pytest.approx(0.5)


def test_a_near_tie_is_no_offence_and_ends_the_row(seed):
    reference = generation(seed)
    ours = changed(reference, 1, 2, int(reference.tokens_BN[1, 2] + 1) % 11)
    ours.logits_BNV[1, 3:] += 100.0
    margin = agreement(ours, reference).divergences[0].margin
    assert first_offence(ours, reference, 1, margin / 1.99) is None
    assert first_offence(ours, reference, 1, margin / 2.01) == 2
    assert first_offence(ours, reference, 0, 0.0) is None


def test_a_logit_outside_the_tolerance_is_an_offence(seed):
    reference = generation(seed)
    ours = generation(seed)
    ours.logits_BNV[0, 3, 1] += 0.5
    assert first_offence(ours, reference, 0, 0.49) == 3
    assert first_offence(ours, reference, 0, 0.51) is None
    ours.logits_BNV[0, 1, 1] = torch.nan
    assert first_offence(ours, reference, 0, 10.0) == 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tolerance_follows_the_spread_of_the_logits(seed, dtype):
    reference = generation(seed)
    doubled = Generation(reference.tokens_BN, reference.logits_BNV * 2)
    shifted = Generation(reference.tokens_BN, reference.logits_BNV + 30.0)
    tolerance = logit_tolerance(reference, dtype)
    assert logit_tolerance(doubled, dtype) == pytest.approx(2 * tolerance)
    assert logit_tolerance(shifted, dtype) == pytest.approx(tolerance, rel=1e-3)
