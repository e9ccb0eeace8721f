"""Whole layers of experts through ``NativeKernel``, on every instruction set, against the torch reference."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.errors import FormatError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec
from gangline.kernels.cpu import native
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.grouping import Grouping, group_by_expert
from gangline.kernels.reference import ExpertMath, ReferenceKernel
from gangline.models import expert_math, expert_tensors, find_moe
from kernels.expert_rig import Experts, biases, clamped_oai, layout_of, relative_error, routed, run, swiglu
from kernels.tile_rig import Kind, quantize
from tiny_models import FAMILIES, tiny_model

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

PLAIN = ("fp32", "fp16", "bf16")
PACKED = (
    "tile16:int8g32",
    "tile16:int4g32",
    "tile16:int4g64z",
    "tile16:int3g32",
    "tile16:int2g128",
    "tile16:mxfp4",
)
# Activations rounded to int8 twice on the way; the weights are the same on both sides.
TOLERANCE = dict.fromkeys(PLAIN, 1e-5) | dict.fromkeys(PACKED, 4e-2)


@pytest.fixture(params=core.usable_kernels())
def table(request: pytest.FixtureRequest):
    before = core.kernels_name()
    core.use_kernels(request.param)
    yield request.param
    core.use_kernels(before)


def check(experts: Experts, x_TD: torch.Tensor, grouping, tolerance: float) -> torch.Tensor:
    got, want = experts.native(x_TD, grouping), experts.reference(x_TD, grouping)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert relative_error(got, want) <= tolerance
    return got


def assert_rounded_twice(
    experts: Experts, x_TD: torch.Tensor, grouping: Grouping, y_PD: torch.Tensor
) -> None:
    """Rows rounded to int8 as the kernels do it; the intermediate is off by half a step of its group at most.

    With few columns and terms that cancel, that is a lot of the result, so the room is that of every element.
    """
    up, down = experts.layout.fields
    group = Kind.of(up.codec).group
    q_TC, scale_TG = quantize(x_TD.numpy(), group)
    x_hat_TD = torch.from_numpy(q_TC * scale_TG.repeat(group, axis=1).astype(np.float64))[:, : up.shape[1]]
    for index, expert in enumerate(grouping.experts):
        pairs = slice(grouping.starts[index], grouping.starts[index + 1])
        up_GD, down_DF = (
            get_codec(f.codec).decode(raw, f.shape, torch.float32).double()
            for f, raw in zip((up, down), experts.raws[expert], strict=True)
        )
        x_ND = x_hat_TD[grouping.token_P[pairs]]
        h_NF = swiglu(x_ND @ up_GD.t())
        padded_NC = torch.nn.functional.pad(h_NF, (0, -h_NF.shape[1] % group))
        step_NG = padded_NC.view(len(h_NF), -1, group).abs().amax(-1) / 127
        room_NF = 0.51 * step_NG.repeat_interleave(group, 1)[:, : h_NF.shape[1]]
        gate_NF, up_NF = (x_ND.abs() @ up_GD.abs().t()).chunk(2, dim=-1)
        room_NF = room_NF + 1e-5 * gate_NF * up_NF  # what fp32 sums of terms that cancel are off
        room_ND = room_NF @ down_DF.abs().t() + 1e-30
        assert ((y_PD[pairs] - h_NF @ down_DF.t()).abs() <= room_ND).all()


@pytest.mark.parametrize("codec", PLAIN + PACKED)
@pytest.mark.parametrize("shape", [(64, 128), (40, 50), (130, 33)])
def test_layers_are_right_for_every_codec(codec: str, shape: tuple[int, int], table: str, seed: int) -> None:
    experts = Experts.random(layout_of(codec, *shape), ExpertMath(swiglu), 6)
    for tokens, top_k in ((1, 4), (3, 2), (40, 3)):
        check(experts, torch.randn(tokens, shape[0]), routed(tokens, 6, top_k), TOLERANCE[codec])


@pytest.mark.parametrize("codec", ["bf16", "tile16:int8g64"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_columns_in_any_order_with_biases(
    codec: str, interleaved: bool, split: bool, table: str, seed: int
) -> None:
    """Fused and split matrices, alternating or not, F not a multiple of 16."""
    gate = clamped_oai if interleaved else swiglu
    math_ = ExpertMath(gate, interleaved, **biases(5, 2 * 41, 48))
    experts = Experts.random(layout_of(codec, 48, 41, split=split), math_, 5)
    for tokens in (1, 9):
        check(experts, torch.randn(tokens, 48), routed(tokens, 5, 3), 4e-2 if "int" in codec else 1e-5)


@pytest.mark.parametrize("codec", ["fp32", "tile16:int8g32"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_experts_without_a_gate(codec: str, has_bias: bool, table: str, seed: int) -> None:
    given_biases = biases(4, 37, 50) if has_bias else {}
    math_ = ExpertMath(torch.nn.functional.gelu, **given_biases)
    experts = Experts.random(layout_of(codec, 50, 37, gated=False), math_, 4)
    check(experts, torch.randn(6, 50), routed(6, 4, 2), 4e-2 if "int" in codec else 1e-5)


@pytest.mark.parametrize("codec", ["fp16", "tile16:int8g32"])
@pytest.mark.parametrize("split", [False, True])
def test_torch_computes_gates_and_norms_that_are_not_native(
    codec: str, split: bool, table: str, seed: int
) -> None:
    def mish(h):
        return torch.nn.functional.mish(h[..., ::2]) * h[..., 1::2].tanh()

    norm = torch.nn.RMSNorm(64)
    unknown = ExpertMath(mish, interleaved=True, post_norm=norm, **biases(5, 2 * 48, 64))
    known = ExpertMath(swiglu, post_norm=norm, **biases(5, 2 * 48, 64))
    for math_ in (unknown, known):
        experts = Experts.random(layout_of(codec, 64, 48, split=split), math_, 5)
        assert (NativeKernel(experts.layout, math_).gate is None) == (math_ is unknown)
        with torch.no_grad():
            check(experts, torch.randn(7, 64), routed(7, 5, 3), 4e-2 if "int" in codec else 1e-4)


@given(
    hidden=st.integers(1, 150),
    intermediate=st.integers(1, 150),
    tokens=st.integers(0, 20),
    count=st.integers(1, 9),
    used=st.integers(1, 9),
    codec=st.sampled_from(["fp32", "bf16", "tile16:int4g32", "tile16:int8g128z"]),
    name=st.sampled_from(core.usable_kernels()),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_shape_any_routing_any_number_of_threads(
    hidden: int,
    intermediate: int,
    tokens: int,
    count: int,
    used: int,
    codec: str,
    name: str,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    experts = Experts.random(layout_of(codec, hidden, intermediate), ExpertMath(swiglu), count)
    used = min(used, count)
    grouping = routed(tokens, count, min(3, used), used)
    x_TD = torch.randn(tokens, hidden)
    before = core.kernels_name(), core.threads()
    try:
        core.use_kernels(name)
        core.set_threads(threads)
        y_PD = experts.native(x_TD, grouping)
        assert y_PD.shape == (len(grouping.token_P), hidden) and y_PD.dtype == torch.float32
        if "int" in codec and tokens:
            assert_rounded_twice(experts, x_TD, grouping, y_PD)
        else:
            assert relative_error(y_PD, experts.reference(x_TD, grouping)) <= 1e-4
        core.set_threads(1)
        assert torch.equal(experts.native(x_TD, grouping), y_PD)
    finally:
        core.use_kernels(before[0])
        core.set_threads(before[1])


@pytest.mark.parametrize("codec", ["bf16", "tile16:int4g32"])
def test_a_pair_does_not_depend_on_its_company(codec: str, table: str, seed: int) -> None:
    experts = Experts.random(layout_of(codec, 96, 80), ExpertMath(swiglu), 4)
    x_TD, grouping = torch.randn(11, 96), routed(11, 4, 2)
    together = experts.native(x_TD, grouping)
    kernel = NativeKernel(experts.layout, experts.math)
    for index, expert in enumerate(grouping.experts):
        weights = kernel.bind(experts.raws[expert])
        for pair in range(grouping.starts[index], grouping.starts[index + 1]):
            token = int(grouping.token_P[pair])
            alone = kernel(x_TD[token : token + 1], weights, expert)
            assert torch.equal(alone[0], together[pair])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_dtype(dtype: torch.dtype, table: str, seed: int) -> None:
    experts = Experts.random(layout_of("fp32", 48, 32), ExpertMath(swiglu), 3)
    check(experts, torch.randn(5, 48).to(dtype), routed(5, 3, 2), 1e-5)


def test_more_pairs_than_fit_at_once(seed: int) -> None:
    """Beyond 4096 pairs the call goes through them in pieces; torch would take such rows of plain numbers."""
    experts = Experts.random(layout_of("tile16:int8g32", 32, 32), ExpertMath(swiglu), 3)
    grouping = routed(3000, 3, 2)
    check(experts, torch.randn(3000, 32), grouping, 2e-2)
    check(experts, torch.randn(9000, 32), routed(9000, 3, 1), 2e-2)


def test_fewer_pairs_than_tokens(table: str, seed: int) -> None:
    """One expert at a time, as leases come, of a long prompt."""
    experts = Experts.random(layout_of("tile16:int8g32", 64, 48), ExpertMath(swiglu), 8)
    x_TD, grouping = torch.randn(50, 64), routed(50, 8, 2)
    whole = experts.native(x_TD, grouping)
    kernel = NativeKernel(experts.layout, experts.math)
    y_PD = torch.full_like(whole, torch.nan)
    for index, expert in enumerate(grouping.experts):
        rows = slice(grouping.starts[index], grouping.starts[index + 1])
        weights = [kernel.bind(experts.raws[expert])]
        count = rows.stop - rows.start
        kernel.pairs(x_TD, grouping.token_P[rows], (0, count), weights, [expert], out_PD=y_PD[rows])
    assert torch.equal(y_PD, whole)


def test_plain_numbers_with_many_rows_go_through_torch(seed: int) -> None:
    experts = Experts.random(layout_of("bf16", 64, 48), ExpertMath(swiglu), 3)
    x_TD = torch.randn(60, 64).bfloat16()
    ids_TK = torch.tensor([[0, 1]] * 3 + [[0, 2]] * 57)
    grouping = group_by_expert(ids_TK, torch.rand(60, 2), 3)
    assert grouping.counts == (60, 3, 57)
    got = experts.native(x_TD, grouping)
    exact = run(ReferenceKernel(experts.layout, experts.math), experts.raws, x_TD, grouping)
    assert torch.equal(got[:60], exact[:60]) and torch.equal(got[63:], exact[63:])
    assert relative_error(got[60:63], exact[60:63]) < 2e-2 and not torch.equal(got[60:63], exact[60:63])


def combine(y_PD: torch.Tensor, grouping: Grouping, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    token_P, weight_P1 = grouping.token_P.contiguous(), grouping.weight_P1.contiguous()
    pairs, hidden = y_PD.shape
    out_TD = torch.full((tokens, hidden), torch.nan, dtype=dtype)
    addresses = y_PD.data_ptr(), token_P.data_ptr(), weight_P1.data_ptr()
    core.combine(*addresses, pairs, tokens, hidden, out_TD.data_ptr(), name)
    return out_TD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 2050), (0, 8), (7, 33), (40, 600)])
def test_combine_adds_up_in_ascending_expert_id(
    dtype: torch.dtype, tokens: int, hidden: int, table: str, seed: int
) -> None:
    grouping = routed(tokens, 9, 4)
    y_PD = torch.randn(len(grouping.token_P), hidden)
    got = combine(y_PD, grouping, tokens, dtype)
    want = torch.zeros(tokens, hidden, dtype=torch.float64)
    want.index_add_(0, grouping.token_P, y_PD.double() * grouping.weight_P1)
    assert got.dtype == dtype and got.shape == want.shape
    assert torch.allclose(got.double(), want, rtol={4: 1e-5}.get(dtype.itemsize, 1e-2), atol=1e-5)
    for token in range(min(tokens, 3)):
        mine = grouping.token_P == token
        total = torch.zeros(hidden, dtype=torch.float64)
        for weight, row in zip(grouping.weight_P1[mine], y_PD[mine], strict=True):
            exact = weight.double() * row.double() + total
            total = exact.float().double() if table != "scalar" else (weight * row + total.float()).double()
        assert torch.equal(got[token], total.float().to(dtype))


def test_a_token_without_pairs_gets_zeros() -> None:
    grouping = group_by_expert(torch.tensor([[0, 9], [9, 9]]), torch.ones(2, 2), 9)
    out = combine(torch.ones(1, 3), grouping, 2, torch.float32)
    assert out.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_calls_from_several_threads(seed: int) -> None:
    experts = Experts.random(layout_of("tile16:int4g32", 64, 64), ExpertMath(swiglu), 4)
    x_TD, grouping = torch.randn(6, 64), routed(6, 4, 2)
    want = experts.native(x_TD, grouping)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(30):
            if not torch.equal(experts.native(x_TD, grouping), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_biases_of_every_family(family: str, seed: int) -> None:
    """The experts of real modules; only transposed ones and unheard-of gates are not computed natively."""
    model = tiny_model(family, seed=seed % 1000)
    for block in find_moe(model).blocks[:2]:
        math_ = expert_math(block)
        tensors = [expert_tensors(block, e) for e in range(4)]
        fields = tuple(
            FieldSpec(f.name, f.shape, "fp32", get_codec("fp32").nbytes(f.shape), f.transposed)
            for f in block.fields
        )
        if any(field.transposed for field in fields):
            assert "(in, out)" in (NativeKernel.supports(ExpertLayout(fields), math_) or "")
            tensors = [
                tuple(t.t() if f.transposed else t for f, t in zip(fields, one, strict=True))
                for one in tensors
            ]
            fields = tuple(
                FieldSpec(f.name, f.shape[::-1] if f.transposed else f.shape, f.codec, f.nbytes)
                for f in fields
            )
        raws = [tuple(get_codec("fp32").encode(t) for t in one) for one in tensors]
        experts = Experts(ExpertLayout(fields), math_, raws)
        with torch.no_grad():
            check(experts, torch.randn(5, block.geometry.hidden), routed(5, 4, 2), 2e-5)
        assert NativeKernel(experts.layout, math_).gate is not None or family.startswith("inkling")


def test_reasons_and_errors(seed: int) -> None:
    layout = layout_of("fp32", 16, 16)
    flipped = ExpertLayout(tuple(FieldSpec(f.name, f.shape, f.codec, f.nbytes, True) for f in layout.fields))
    assert "(in, out)" in (NativeKernel.supports(flipped, ExpertMath(swiglu)) or "")
    with pytest.raises(FormatError, match="ReferenceKernel"):
        NativeKernel(flipped, ExpertMath(swiglu))
    assert "ggml:Q5_0" in (NativeKernel.supports(layout_of("ggml:Q5_0", 32, 32), ExpertMath(swiglu)) or "")
    one = layout_of("tile16:int4g32", 64, 64, split=True).fields
    mixed = ExpertLayout((one[0], layout_of("tile16:int4g64", 64, 64, split=True).fields[1], one[2]))
    assert "differently" in (NativeKernel.supports(mixed, ExpertMath(swiglu)) or "")
    w = torch.zeros(64, 16)
    layer = core.MoELayer(16, 16, "silu")
    matrices = [core.Matrix(w.data_ptr(), 32, 16, "fp32"), core.Matrix(w.data_ptr(), 16, 16, "fp32")]
    good, bad = core.Expert(matrices), core.Expert(matrices[::-1])
    ids = torch.tensor([0, 1])
    x, y = torch.zeros(1, 16), torch.zeros(2, 16)
    with pytest.raises(ValueError, match="layer needs 32 x 16"):
        core.experts_forward(layer, x.data_ptr(), "f32", 1, ids.data_ptr(), [0, 1], [bad], y.data_ptr())
    with pytest.raises(ValueError, match="row that does not exist"):
        core.experts_forward(layer, x.data_ptr(), "f32", 1, ids.data_ptr(), [0, 2], [good], y.data_ptr())
    with pytest.raises(ValueError, match="descend"):
        core.experts_forward(
            layer, x.data_ptr(), "f32", 1, ids.data_ptr(), [0, 1, 0], [good] * 2, y.data_ptr()
        )


def test_scratch_memory_is_bounded(seed: int) -> None:
    experts = Experts.random(layout_of("tile16:int4g32", 2048, 1024), ExpertMath(swiglu), 1)
    kernel = NativeKernel(experts.layout, experts.math)
    assert kernel.packed
    assert kernel.scratch_bytes(1, 8) < 1 << 20
    assert kernel.scratch_bytes(512, 4096) < 24 << 20
    assert kernel.scratch_bytes(10**6, 10**7) == kernel.scratch_bytes(4097, 4096)
