"""Products with plain numbers (fp32, fp16, bf16) on every usable instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gangline.kernels.cpu import native

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=core.usable_kernels())
def table(request: pytest.FixtureRequest):
    before = core.kernels_name()
    core.use_kernels(request.param)
    yield request.param
    core.use_kernels(before)


def multiply(w_OI: Tensor, x_TI: Tensor, codec: str, shift: int = 0) -> Tensor:
    """The kernel's product with weights that begin ``shift`` bytes after a multiple of 64."""
    raw = w_OI.contiguous().view(-1).view(torch.uint8)
    space = torch.empty(len(raw) + 128, dtype=torch.uint8)
    at = -space.data_ptr() % 64 + shift
    space[at : at + len(raw)] = raw
    y_TO = torch.full((len(x_TI), len(w_OI)), torch.nan)
    matrix = core.Matrix(space.data_ptr() + at, *w_OI.shape, codec)
    core._matmul(matrix, x_TI.data_ptr(), len(x_TI), y_TO.data_ptr())
    return y_TO


def assert_product(w_OI: Tensor, x_TI: Tensor, y_TO: Tensor) -> None:
    want = x_TI.double() @ w_OI.double().t()
    magnitude = x_TI.double().abs() @ w_OI.double().abs().t()
    assert ((y_TO - want).abs() <= 1e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 32), (19, 130), (50, 257)])
def test_products_are_right(codec: str, tokens: int, shape: tuple[int, int], table: str, seed: int) -> None:
    w_OI = torch.randn(shape).to(DTYPES[codec])
    x_TI = torch.randn(tokens, shape[1])
    assert_product(w_OI, x_TI, multiply(w_OI, x_TI, codec))


@pytest.mark.parametrize("codec", DTYPES)
def test_weights_may_lie_at_any_byte(codec: str, table: str, seed: int) -> None:
    w_OI = torch.randn(21, 45).to(DTYPES[codec])
    x_TI = torch.randn(3, 45)
    want = multiply(w_OI, x_TI, codec)
    for shift in (1, 2, 3, 63):
        assert torch.equal(multiply(w_OI, x_TI, codec, shift), want)


@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 140),
    tokens=st.integers(1, 12),
    codec=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(core.usable_kernels()),
    seed=st.integers(0, 2**31),
)
def test_a_row_gives_the_same_whatever_is_computed_with_it(
    rows: int, cols: int, tokens: int, codec: str, name: str, seed: int
) -> None:
    before, threads = core.kernels_name(), core.threads()
    random = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(rows, cols, generator=random).to(DTYPES[codec])
    x_TI = torch.randn(tokens, cols, generator=random)
    try:
        core.use_kernels(name)
        together = multiply(w_OI, x_TI, codec)
        core.set_threads(3 if threads != 3 else 2)
        alone = torch.cat([multiply(w_OI, x_TI[t : t + 1].contiguous(), codec) for t in range(tokens)])
    finally:
        core.use_kernels(before)
        core.set_threads(threads)
    assert torch.equal(together, alone)
    assert_product(w_OI, x_TI, together)


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("cols", [511, 1024, 1061])
def test_many_tokens_give_the_sums_of_each_alone(codec: str, cols: int, table: str, seed: int) -> None:
    # More columns than a panel has, and more tokens (101) than pass one panel by.
    w_OI = torch.randn(27, cols).to(DTYPES[codec])
    x_TI = torch.randn(101, cols)
    together = multiply(w_OI, x_TI, codec)
    alone = torch.cat([multiply(w_OI, x_I[None].contiguous(), codec) for x_I in x_TI])
    assert torch.equal(together, alone)
    assert_product(w_OI, x_TI, together)


def test_special_values_pass_through(table: str) -> None:
    # Subnormal halves, the largest, infinities: each column by itself.
    values = torch.tensor([6e-8, 5.96e-8 * 1023, 65504.0, -65504.0, torch.inf, -torch.inf, -0.0, 1.0])
    w_OI = values[:, None].half().repeat(1, 2)
    w_OI[:, 1] = 0
    y = multiply(w_OI, torch.tensor([[1.0, 0.0]]), "fp16")
    assert torch.equal(y[0], w_OI[:, 0].float())
    assert torch.isnan(multiply(torch.full((3, 5), torch.nan).bfloat16(), torch.ones(1, 5), "bf16")).all()


@pytest.mark.parametrize("x_dtype", ROWS)
@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 150])
def test_linear_reads_and_writes_every_dtype(
    x_dtype: str, codec: str, tokens: int, table: str, seed: int
) -> None:
    w_OI = torch.randn(75, 90).to(DTYPES[codec])
    bias_O = torch.randn(75)
    x_TI = torch.randn(tokens, 90).to(ROWS[x_dtype])
    matrix = core.Matrix(w_OI.data_ptr(), 75, 90, codec)
    for y_dtype in ("f32", x_dtype):
        y_TO = torch.full((tokens, 75), torch.nan, dtype=ROWS[y_dtype])
        core.linear(matrix, x_TI.data_ptr(), x_dtype, tokens, y_TO.data_ptr(), y_dtype, bias_O.data_ptr())
        want = (x_TI.double() @ w_OI.double().t() + bias_O).float()
        step = {"f32": 2e-6, "f16": 1e-3, "bf16": 8e-3}[y_dtype]
        assert torch.allclose(y_TO.float(), want, rtol=step, atol=1e-4)


def test_rounding_to_bf16_and_fp16_is_torchs(table: str, seed: int) -> None:
    values = torch.cat(
        [
            torch.randn(500) * torch.logspace(-9, 6, 500),
            torch.tensor([65519.9, 65520.0, -7e4, 3e-8, 2.9e-8, 6e-5, 0.0, -0.0, torch.inf, torch.nan]),
            torch.tensor([1.00390625, 1.01171875]),  # halfway between two bf16: to the even one
        ]
    )
    one = torch.ones(1, 1)
    matrix = core.Matrix(one.data_ptr(), 1, 1, "fp32")
    for name in ("bf16", "f16"):
        y = torch.empty(len(values), 1, dtype=ROWS[name])
        core.linear(matrix, values.data_ptr(), "f32", len(values), y.data_ptr(), name, 0)
        want = values.to(ROWS[name])
        same = y[:, 0].eq(want) | (y[:, 0].isnan() & want.isnan())
        assert same.all()


def test_mismatches_are_refused() -> None:
    w = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="dtype 'f64'"):
        core.linear(core.Matrix(w.data_ptr(), 4, 8, "fp32"), 0, "f64", 0, 0, "f32", 0)
    with pytest.raises(ValueError, match="unlike the first"):
        matrices = [core.Matrix(w.data_ptr(), 4, 8, "fp32"), core.Matrix(w.data_ptr(), 2, 8, "fp32")]
        core.grouped_products(matrices, w.data_ptr(), "f32", 2, 0, [0, 1, 2], w.data_ptr(), 4)
