"""Products with sparse tiles (``samoyeds16:``) on every usable instruction set, against the decoded matrix.

Shape suffixes: O rows, I columns, T tokens.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.formats.samoyeds_arrays import prune_magnitude
from gangline.kernels.cpu import native
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.cpu.packed_linear import PackedLinear
from gangline.kernels.reference import ExpertMath
from kernels.expert_rig import Experts, biases, layout_of, random_matrix, relative_error, routed, swiglu
from kernels.tile_rig import quantize

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

# One, two and many accumulators; segments of half a step, of a step, of many; lanes that stay empty.
PATTERNS = ("1:1:32", "1:2:32", "1:2:16", "1:2:128", "1:4:128", "3:4:64", "4:8:32", "8:16:256", "2:16:64")
VALUES = ("bf16", "fp16", "int8g64", "int4g32", "int4g128")
CODECS = [f"samoyeds16:{pattern}/{values}" for pattern in PATTERNS for values in VALUES]
SHAPES = ((1, 1), (5, 100), (32, 64), (33, 129), (130, 515), (257, 16))
TOKENS = (1, 2, 3, 7, 9)
ACTIVATION_GROUP = 64


@pytest.fixture(params=core.usable_kernels())
def table(request: pytest.FixtureRequest):
    before = core.kernels_name(), core.threads()
    core.use_kernels(request.param)
    yield request.param
    core.use_kernels(before[0])
    core.set_threads(before[1])


def make(name: str, rows: int, cols: int) -> Tensor:
    """Bytes of a random matrix."""
    return random_matrix(FieldSpec("w", (rows, cols), name, get_codec(name).nbytes((rows, cols))))


def multiply(raw: Tensor, shape: tuple[int, int], name: str, x_TI: Tensor, shift: int = 0) -> Tensor:
    """The kernel's product; the weights begin ``shift`` bytes after a multiple of 64.

    Nothing but NaN and the greatest bytes lie around activations and weights.
    """
    space = torch.full((len(raw) + 256,), 255, dtype=torch.uint8)
    at = -space.data_ptr() % 64 + 64 + shift
    space[at : at + len(raw)] = raw
    around_x = torch.full((x_TI.numel() + 128,), torch.nan)
    around_x[64:-64] = x_TI.flatten()
    around_y = torch.full((len(x_TI) * shape[0] + 64,), torch.nan)
    matrix = core.Matrix(space.data_ptr() + at, *shape, name)
    core._matmul(matrix, around_x[64:].data_ptr(), len(x_TI), around_y[32:].data_ptr())
    assert around_y[:32].isnan().all() and around_y[-32:].isnan().all()
    return around_y[32:-32].view(len(x_TI), shape[0])


def assert_close(raw: Tensor, shape: tuple[int, int], name: str, x_TI: Tensor, y_TO: Tensor) -> None:
    w_OI = get_codec(name).decode(raw, shape, torch.float32).double()
    x = x_TI.double()
    if "/int" in name:
        q_TC, scale_TG = quantize(x_TI.numpy(), ACTIVATION_GROUP)
        x_TC = q_TC.astype(np.float64) * np.repeat(scale_TG.astype(np.float64), ACTIVATION_GROUP, axis=1)
        x = torch.from_numpy(x_TC[:, : shape[1]])
    magnitude = x.abs() @ w_OI.abs().t()
    assert ((y_TO - x @ w_OI.t()).abs() <= 1e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize("name", CODECS)
def test_products_of_every_shape(name: str, table: str, seed: int) -> None:
    for shape in SHAPES:
        raw = make(name, *shape)
        x_TI = torch.randn(max(TOKENS), shape[1])
        everything = multiply(raw, shape, name, x_TI)
        assert_close(raw, shape, name, x_TI, everything)
        for tokens in TOKENS[:-1]:
            assert torch.equal(multiply(raw, shape, name, x_TI[:tokens]), everything[:tokens]), shape


@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 300)),
    tokens=st.integers(1, 11),
    name=st.sampled_from(CODECS),
    kernels=st.sampled_from(core.usable_kernels()),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_a_row_gives_the_same_whatever_is_computed_with_it(
    shape: tuple[int, int], tokens: int, name: str, kernels: str, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    before = core.kernels_name(), core.threads()
    raw, x_TI = make(name, *shape), torch.randn(tokens, shape[1])
    try:
        core.use_kernels(kernels)
        core.set_threads(1)
        together = multiply(raw, shape, name, x_TI)
        core.set_threads(threads)
        alone = [multiply(raw, shape, name, x_TI[t : t + 1]) for t in range(tokens)]
    finally:
        core.use_kernels(before[0])
        core.set_threads(before[1])
    assert torch.equal(together, torch.cat(alone))
    assert_close(raw, shape, name, x_TI, together)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_identity_shows_the_weights(pattern: str, table: str, seed: int) -> None:
    shape = (70, 96)
    for values in ("bf16", "fp16"):
        name = f"samoyeds16:{pattern}/{values}"
        raw = make(name, *shape)
        want = get_codec(name).decode(raw, shape, torch.float32)
        assert torch.equal(multiply(raw, shape, name, torch.eye(96)).t(), want)


@pytest.mark.parametrize("values", ["bf16", "fp16"])
def test_whole_numbers_are_exact(values: str, table: str, seed: int) -> None:
    name, shape = f"samoyeds16:1:2:32/{values}", (64, 448)
    codec = get_codec(name)
    assert isinstance(codec, SparseCodec)
    w_OI = prune_magnitude(torch.randint(-4, 5, shape).float(), codec.pattern)
    x_TI = torch.randint(-4, 5, (3, 448)).float()
    assert torch.equal(multiply(codec.encode(w_OI), shape, name, x_TI), x_TI @ w_OI.t())


@pytest.mark.parametrize("values", ["int8g32", "int8g128", "int4g32", "int4g128"])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_intermediate_overflows(values: str, sign: int, table: str) -> None:
    """The greatest codes with the greatest activations, of one sign and of both."""
    for pattern in ("1:1:32", "1:2:128"):
        name, shape = f"samoyeds16:{pattern}/{values}", (32, 512)
        codec = get_codec(name)
        assert isinstance(codec, SparseCodec)
        ones = prune_magnitude(torch.ones(shape), codec.pattern)
        for w_OI in (ones, -ones, ones * torch.tensor([1.0, -1.0]).repeat(256)):
            raw = codec.encode(w_OI)
            for x_TI in (torch.full((2, 512), float(sign)), torch.tensor([1.0, -1.0]).repeat(2, 256) * sign):
                assert_close(raw, shape, name, x_TI, multiply(raw, shape, name, x_TI))


def test_special_halves_pass_through(table: str) -> None:
    values = torch.tensor([6e-8, 5.96e-8 * 1023, 65504.0, -65504.0, torch.inf, -torch.inf, 1.0])
    w_OI = torch.zeros(7, 4, dtype=torch.float16)
    w_OI[:, 1] = values.half()
    x_TI = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    name = "samoyeds16:1:1:32/fp16"
    # The other value kept of the group is a zero at column 0.
    y = multiply(get_codec(name).encode(w_OI), (7, 4), name, x_TI)
    assert torch.equal(y[0], w_OI[:, 1].float())


@pytest.mark.parametrize("name", CODECS)
def test_data_need_not_be_aligned(name: str, table: str, seed: int) -> None:
    shape = (33, 160)
    raw, x_TI = make(name, *shape), torch.randn(3, 160)
    aligned = multiply(raw, shape, name, x_TI)
    for shift in (1, 2, 31):
        assert torch.equal(multiply(raw, shape, name, x_TI, shift), aligned)


def test_outliers_zeros_and_tiny_activations(table: str, seed: int) -> None:
    shape = (40, 200)
    for name in ("samoyeds16:1:2:32/int4g32", "samoyeds16:3:4:32/int8g64", "samoyeds16:1:2:32/bf16"):
        raw, x_TI = make(name, *shape), torch.randn(5, 200)
        x_TI[0] = 0
        x_TI[1, 77] = 1e30
        x_TI[2] *= 1e-30
        x_TI[3, 33:170] = 0
        y_TO = multiply(raw, shape, name, x_TI)
        assert_close(raw, shape, name, x_TI, y_TO)
        assert not y_TO[0].any()


@pytest.mark.parametrize("pattern", ["1:2:32", "3:4:32", "1:1:32", "1:4:64"])
@pytest.mark.parametrize("values", ["bf16", "fp16", "int8g64", "int4g32"])
def test_layers_of_experts(pattern: str, values: str, table: str, seed: int) -> None:
    """Fused and split matrices, rows of a task that cut tiles, one token and many."""
    tolerance = 1e-5 if values in ("bf16", "fp16") else 3e-2
    for hidden, intermediate, split in ((64, 128, False), (130, 41, False), (48, 41, True)):
        layout = layout_of(f"samoyeds16:{pattern}/{values}", hidden, intermediate, split=split)
        experts = Experts.random(layout, ExpertMath(swiglu, **biases(5, 2 * intermediate, hidden)), 5)
        for tokens in (1, 3, 150):
            x_TD, grouping = torch.randn(tokens, hidden), routed(tokens, 5, 2)
            y_PD = experts.native(x_TD, grouping)
            assert relative_error(y_PD, experts.reference(x_TD, grouping)) <= tolerance
            core.set_threads(3)
            assert torch.equal(experts.native(x_TD, grouping), y_PD)
            core.set_threads(1)


def test_gate_and_up_must_round_activations_alike() -> None:
    def layout(gate: str, up: str) -> ExpertLayout:
        shapes = (("gate", (64, 64), gate), ("up", (64, 64), up), ("down", (64, 64), gate))
        return ExpertLayout(
            tuple(
                FieldSpec(name, shape, codec, get_codec(codec).nbytes(shape)) for name, shape, codec in shapes
            )
        )

    codes = ("samoyeds16:1:2:32/int4g128", "samoyeds16:1:2:32/int8g32")
    assert NativeKernel.supports(layout(*codes), ExpertMath(swiglu)) is None
    assert NativeKernel.supports(layout(codes[0], "tile16:int4g64"), ExpertMath(swiglu)) is None
    mixed = NativeKernel.supports(layout(codes[0], "samoyeds16:1:2:32/bf16"), ExpertMath(swiglu))
    assert mixed is not None and "round activations differently" in mixed


@pytest.mark.parametrize("name", ["samoyeds16:1:2:32/bf16", "samoyeds16:4:8:32/int8g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_linear_layers(name: str, dtype: torch.dtype, table: str, seed: int) -> None:
    raw, bias_O = make(name, 150, 96), torch.randn(150)
    layer = PackedLinear(raw, name, 96, 150, bias_O)
    assert layer.matrix is not None
    x_TI = torch.randn(5, 96).to(dtype)
    got = layer(x_TI)
    assert got.dtype == dtype and torch.equal(layer(x_TI[:1]), got[:1])
    want = torch.nn.functional.linear(x_TI.float(), layer.weight, bias_O)
    assert relative_error(got.float(), want) < 3e-2


def test_what_cannot_be_is_refused() -> None:
    for name in ("samoyeds16:1:2:48/bf16", "samoyeds16:1:32:32/bf16", "samoyeds16:1:2:32/fp32"):
        with pytest.raises(ValueError, match="does not know"):
            core.Matrix(0, 64, 64, name)
    for name in CODECS:
        assert name in core.native_formats()
