"""Weighted sums inside the native call have the bits of outputs that are combined afterwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gangline.kernels.cpu import native
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.grouping import Grouping
from gangline.kernels.reference import ExpertMath
from gangline.kernels.sums import accumulate
from kernels.expert_rig import Experts, biases, layout_of, routed, swiglu

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

CODECS = (
    "tile16:int4g32d",
    "tile16:int8g64z",
    "tile16:mxfp4",
    "ggml:Q4_0",
    "samoyeds16:1:2:32/int8g64",
    "bf16",
)


@pytest.fixture(autouse=True)
def same_core_after():
    before, threads = core.kernels_name(), core.threads()
    yield
    core.use_kernels(before)
    core.set_threads(threads)


def both(experts: Experts, x_TD: torch.Tensor, grouping: Grouping) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums added to what was there before, by one call and by two."""
    kernel = NativeKernel(experts.layout, experts.math)
    weights = [kernel.bind(experts.raws[e]) for e in grouping.experts]
    before_TD = torch.randn(len(x_TD), x_TD.shape[1])
    once_TD, twice_TD = before_TD.clone(), before_TD.clone()
    kernel.add(x_TD, grouping, weights, once_TD)
    y_PD = kernel.pairs(x_TD, grouping.token_P, grouping.starts, weights, grouping.experts)
    accumulate(y_PD, grouping, twice_TD)
    return once_TD, twice_TD


@given(
    codec=st.sampled_from(CODECS),
    tokens=st.integers(0, 40),
    hidden=st.sampled_from([32, 96, 352]),
    intermediate=st.sampled_from([32, 160]),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
    kernels=st.sampled_from(core.usable_kernels()),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_are_those_of_outputs_combined(
    codec: str,
    tokens: int,
    hidden: int,
    intermediate: int,
    has_bias: bool,
    threads: int,
    kernels: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    core.use_kernels(kernels)
    core.set_threads(threads)
    layout = layout_of(codec, hidden, intermediate)
    math = ExpertMath(swiglu, **(biases(6, 2 * intermediate, hidden) if has_bias else {}))
    once_TD, twice_TD = both(
        Experts.random(layout, math, 6), torch.randn(tokens, hidden), routed(tokens, 6, 3)
    )
    assert torch.equal(once_TD, twice_TD)


def test_more_pairs_than_are_under_way_at_a_time(seed: int) -> None:
    experts = Experts.random(layout_of("tile16:int4g32d", 64, 32), ExpertMath(swiglu), 5)
    once_TD, twice_TD = both(experts, torch.randn(1500, 64).bfloat16(), routed(1500, 5, 4))
    assert torch.equal(once_TD, twice_TD)


def test_sums_need_the_row_of_every_pair() -> None:
    layer = core.MoELayer(32, 32)
    expert = core.Expert([core.Matrix(64, 64, 32, "bf16"), core.Matrix(64, 32, 32, "bf16")])
    with pytest.raises(ValueError, match="row of every pair"):
        core.experts_sums(layer, 64, "f32", 1, 0, [0, 1], [expert], 64, 64)
