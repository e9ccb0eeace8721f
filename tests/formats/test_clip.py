import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import FormatError
from gangline.formats import clip
from gangline.formats.clip import plain_scale, search_scale

BITS = [2, 3, 4, 6, 8]


def loss(w_NL: torch.Tensor, scale_N: torch.Tensor, bits: int) -> np.ndarray:
    """What the errors of every group count, in float64, from the fp32 weights that decoding gives."""
    w, s = w_NL.numpy(), scale_N.numpy()[:, None]
    unit = plain_scale(w_NL.abs().amax(1), bits).double().numpy()[:, None]
    codes = np.clip(np.rint(w / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.float32)
    steps = np.abs((codes * s).astype(np.float64) - w) / unit
    return (steps**2 * (1 + 2 * steps)).sum(1)


def groups(kind: str, seed: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w_NL = torch.randn(40, 32, generator=generator)
    if kind == "heavy":
        w_NL = w_NL.sign() * w_NL.abs() ** 3
    if kind == "outlier":
        w_NL[:, 5] *= 50
    if kind == "one sided":
        w_NL = w_NL.abs()
    if kind == "sparse":
        w_NL[:, 3:] = 0
    return w_NL * spread


kinds = st.sampled_from(["normal", "heavy", "outlier", "one sided", "sparse"])
seeds = st.integers(0, 2**32 - 1)
spreads = st.sampled_from([1e-2, 1.0, 300.0])


@given(bits=st.sampled_from(BITS), kind=kinds, seed=seeds, spread=spreads)
def test_search_never_loses_to_plain_rounding(bits: int, kind: str, seed: int, spread: float) -> None:
    w_NL = groups(kind, seed, spread)
    plain = plain_scale(w_NL.abs().amax(1), bits)
    assert (loss(w_NL, search_scale(w_NL, bits), bits) <= loss(w_NL, plain, bits)).all()


@given(bits=st.sampled_from(BITS), kind=kinds, seed=seeds, spread=spreads)
def test_search_finds_the_best_of_all_candidates(bits: int, kind: str, seed: int, spread: float) -> None:
    w_NL = groups(kind, seed, spread)
    peak = w_NL.abs().amax(1)
    largest = (2**bits - 1) / 2
    steps = [largest / (1 - i / 50) for i in range(40)] + [2.0 ** (bits - 1), 2.0 ** (bits - 1) - 1]
    sign = torch.where(w_NL.amax(1) == peak, -1.0, 1.0)
    sign[w_NL.amin(1) == -peak] = 1.0
    tried = [(peak / step).clamp(min=2.0**-14).half().float() * sign for step in steps]
    best = np.min([loss(w_NL, scale, bits) for scale in tried], axis=0)
    found = search_scale(w_NL, bits)
    assert torch.stack([found == scale for scale in tried]).any(0).all()
    # A group without any error in one candidate can only be matched to fp32's rounding of weights.
    floor = 32 * (2**bits * 2e-7) ** 2
    assert (loss(w_NL, found, bits) <= best * (1 + 1e-4) + floor).all()


@pytest.mark.parametrize("bits", BITS)
def test_search_halves_the_loss_at_two_bits_and_helps_at_four(bits: int, seed: int) -> None:
    w_NL = torch.randn(500, 32)
    ratio = loss(w_NL, search_scale(w_NL, bits), bits).sum()
    ratio /= loss(w_NL, plain_scale(w_NL.abs().amax(1), bits), bits).sum()
    assert ratio < {2: 0.7, 3: 0.8, 4: 0.9, 6: 1.0, 8: 1.0}[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_a_grid_twice_as_fine_gains_little(bits: int, kind: str, seed: int) -> None:
    w_NL = torch.cat([groups(kind, seed + i, 1.0) for i in range(25)])
    coarse = loss(w_NL, search_scale(w_NL, bits), bits).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "GRID", 100)
        fine = loss(w_NL, search_scale(w_NL, bits), bits).sum()
    assert fine <= coarse < (1.04 if bits == 6 else 1.01) * fine


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_weight_has_the_wider_side(bits: int, seed: int) -> None:
    w_NL = torch.randn(500, 32)
    w_NL[:, 0] = w_NL.abs().amax(1) * 1.001
    scale_N = search_scale(w_NL, bits)
    assert (scale_N < 0).all()
    assert torch.equal(search_scale(-w_NL, bits), -scale_N)
    assert loss(w_NL, scale_N, bits).sum() < 0.97 * loss(w_NL, -scale_N, bits).sum()


@pytest.mark.parametrize("bits", BITS)
def test_weights_on_a_grid_come_back_unchanged(bits: int, seed: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes_NL = torch.randint(low, high + 1, (64, 32)).float()
    codes_NL[::2, 0] = low
    codes_NL[1::2] = codes_NL[1::2].clamp(min=-high)
    codes_NL[1::2, 0] = high
    scale_N = (torch.rand(64) + 0.01).half().float()
    w_NL = codes_NL * scale_N[:, None]
    assert loss(w_NL, search_scale(w_NL, bits), bits).sum() == 0


@given(bits=st.sampled_from(BITS), kind=kinds, seed=seeds)
def test_ending_the_search_early_does_not_change_the_result(bits: int, kind: str, seed: int) -> None:
    w_NL = groups(kind, seed, 1.0)
    quick = search_scale(w_NL, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "_clip_cost", lambda _, scale_N, unit_N: torch.full_like(unit_N, -1.0))
        full = search_scale(w_NL, bits)
    assert torch.equal(quick, full)


@pytest.mark.parametrize("bits", BITS)
def test_empty_and_tiny_groups_get_a_normal_scale(bits: int) -> None:
    w_NL = torch.zeros(3, 32)
    w_NL[1, 0] = 1e-30
    w_NL[2] = 3e-5
    assert (search_scale(w_NL, bits).abs() >= 2.0**-14).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(value: float) -> None:
    w_NL = torch.randn(4, 32)
    w_NL[2, 7] = value
    with pytest.raises(FormatError, match="nan or infinite"):
        search_scale(w_NL, 4)


@pytest.mark.parametrize("bits", BITS)
def test_weights_past_an_fp16_scale_are_refused(bits: int) -> None:
    limit = 65504.0 * (2 ** (bits - 1) - 1)
    assert torch.isfinite(search_scale(torch.full((1, 32), limit), bits)).all()
    with pytest.raises(FormatError, match="keep this matrix in fp32"):
        search_scale(torch.full((1, 32), 1.01 * limit), bits)
