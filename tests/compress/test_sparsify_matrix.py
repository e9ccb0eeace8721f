"""One matrix: masks are valid, corrections help, the methods rank as they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.sparsify_rig import correlated, moments_of
from gangline.compress.sparsify.admm import prune_admm, refine
from gangline.compress.sparsify.moments import Moments
from gangline.compress.sparsify.obs import prune_obs
from gangline.compress.sparsify.permute import best_order
from gangline.compress.sparsify.prune import prune
from gangline.compress.sparsify.settings import METHODS, SparsifySettings
from gangline.core.errors import FormatError, UsageError
from gangline.formats import get_codec
from gangline.formats.samoyeds_pattern import SparsePattern, keep_mask

PATTERNS = ("2:4", "1:2:16", "1:2:32", "3:4:32", "4:8:32")


@given(
    st.tuples(st.integers(1, 24), st.integers(1, 80)),
    st.sampled_from(PATTERNS),
    st.sampled_from(METHODS),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_every_method_leaves_the_pattern(
    shape: tuple[int, int], pattern: str, method: str, seed: int
) -> None:
    torch.manual_seed(seed)
    kind = SparsePattern.parse(pattern)
    weight, moments = torch.randn(shape), moments_of(correlated(50, shape[1]))
    pruned = prune(weight, kind, method, moments)  # type: ignore[arg-type]
    assert pruned.isfinite().all()
    raw = get_codec(f"samoyeds:{kind}/bf16").encode(pruned)  # refuses what lacks the pattern
    assert torch.equal(
        get_codec(f"samoyeds:{kind}/bf16").decode(raw, shape, torch.float32), pruned.bfloat16().float()
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_corrections_lower_the_error(pattern: str, seed: int) -> None:
    torch.manual_seed(seed)
    kind = SparsePattern.parse(pattern)
    errors = dict.fromkeys(METHODS, 0.0)
    for _ in range(4):
        weight, x_NI = torch.randn(32, 64), correlated(512, 64)
        moments = moments_of(x_NI)
        for method in METHODS:
            errors[method] += moments.error(prune(weight, kind, method, moments) - weight)
    assert errors["alps"] < errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"])


def test_the_update_is_exact_for_one_segment_of_one_row() -> None:
    """Two of four weights go; the optimum under that mask is a least-squares problem of two unknowns."""
    torch.manual_seed(0)
    weight, moments = torch.tensor([[4.0, 3.0, 0.1, 0.2]]), moments_of(correlated(64, 4), damping=1e-6)
    pruned = prune_obs(weight, moments, SparsePattern.parse("2:4"))
    # Weights left of a pruned one can no longer answer it: here the pruned ones are last, so nothing changes.
    assert pruned.tolist() == [[4.0, 3.0, 0.0, 0.0]]
    weight = weight.flip(1)
    pruned = prune_obs(weight, moments, SparsePattern.parse("2:4"))
    h_II = moments.h_II.double()
    best = torch.linalg.solve(h_II[2:, 2:], h_II[2:] @ weight[0].double())
    torch.testing.assert_close(pruned[0, 2:].double(), best, rtol=1e-3, atol=1e-3)


def test_without_correlations_the_update_does_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    size_I = torch.rand(64) + 0.1
    moments = Moments(size_I.square().diag(), 1e-9)
    weight, kind = torch.randn(16, 64), SparsePattern.parse("1:2:32")
    expected = weight.masked_fill(~keep_mask((weight * size_I).square(), kind), 0)
    torch.testing.assert_close(prune_obs(weight, moments, kind), expected)
    torch.testing.assert_close(prune_admm(weight, moments, kind), expected, rtol=1e-4, atol=1e-5)


def test_a_scale_of_the_inputs_changes_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    weight, x_NI = torch.randn(16, 64), correlated(256, 64)
    for method in ("wanda", "sparsegpt"):
        kind = SparsePattern.parse("1:2:32")
        one, other = (prune(weight, kind, method, moments_of(x)) for x in (x_NI, 1024 * x_NI))  # type: ignore[arg-type]
        torch.testing.assert_close(one, other)


def test_refining_finds_the_least_squares(seed: int) -> None:
    torch.manual_seed(seed)
    weight, moments = torch.randn(3, 16), moments_of(correlated(200, 16))
    mask = keep_mask(weight.abs(), SparsePattern.parse("2:4"))
    found = refine(weight * mask, weight, mask, moments, steps=60)
    h_II = moments.damped_II.double()
    for row, keep in enumerate(mask):
        right = h_II[keep] @ weight[row].double()
        best = torch.linalg.solve(h_II[keep][:, keep], right)
        torch.testing.assert_close(found[row, keep].double(), best, rtol=1e-3, atol=1e-3)
    assert not found[~mask].any()


def test_wanda_keeps_more_of_what_inputs_make_of_the_weights_and_magnitude_more_of_the_weights(
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight, x_NI = torch.randn(32, 128), torch.randn(300, 128) * torch.logspace(-1, 1, 128)
    moments, kind = moments_of(x_NI), SparsePattern.parse("1:2:32")
    plain, wanda = (prune(weight, kind, method, moments) for method in ("magnitude", "wanda"))  # type: ignore[arg-type]
    # Sizes and not their squares: these are what the best mask has most of, whatever the weights.
    size, seen = weight.abs(), weight.abs() * moments.norm_I
    assert (seen * (wanda != 0)).sum() > (seen * (plain != 0)).sum()
    assert (size * (wanda != 0)).sum() < (size * (plain != 0)).sum()


def test_few_tokens_and_dead_inputs_are_no_accident(seed: int) -> None:
    """Fewer tokens than inputs, and inputs that are always zero: still finite, the weights not all lost."""
    torch.manual_seed(seed)
    x_NI = correlated(5, 64)
    x_NI[:, :8] = 0
    for method in METHODS:
        pruned = prune(torch.ones(8, 64), SparsePattern.parse("2:4"), method, moments_of(x_NI))
        assert pruned.isfinite().all()
        assert (pruned[:, :8] != 0).any()


def test_channels_are_dealt_out_by_strength(seed: int) -> None:
    """Strong channels side by side lose most; any order given keeps at least what it kept before."""
    torch.manual_seed(seed)
    strength_F = torch.cat([torch.full((32,), 9.0), torch.full((32,), 1.0)])
    ups = [torch.rand(64, 32) * strength_F[:, None]]
    down = torch.rand(32, 64) * strength_F
    order_F, before, after = best_order(ups, down, SparsePattern.parse("1:2:32"))
    assert sorted(order_F.tolist()) == list(range(64))
    assert after > before
    assert set(order_F[::2].tolist()) == set(range(32))
    shuffled = torch.randperm(64)
    _, before, after = best_order(
        [torch.rand(64, 32)[shuffled]], torch.rand(32, 64), SparsePattern.parse("2:4")
    )
    assert after >= before


def test_settings_refuse_what_there_is_not() -> None:
    with pytest.raises(UsageError, match="unknown method"):
        SparsifySettings(method="obc")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="unknown sparse pattern"):
        SparsifySettings(pattern="50%")
    with pytest.raises(FormatError, match="unknown kind of sparse values"):
        SparsifySettings(precision="int3")
    assert SparsifySettings(pattern="1:2:64", precision="int4").codec.name == "samoyeds:1:2:64/int4g32"
