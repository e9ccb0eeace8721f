"""The native encoder makes the very bytes of the torch codecs, on every usable instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats import codec_names, get_codec
from gangline.kernels.cpu import encoder, native

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

TILED = [name for name in codec_names() if name.startswith("tile16:")]
KINDS = ("normal", "heavy", "tiny", "one sided", "sparse", "grid", "outlier", "subnormal", "zero", "huge")


@pytest.fixture(autouse=True)
def same_kernels_after():
    before, threads = core.kernels_name(), core.threads()
    yield
    core.use_kernels(before)
    core.set_threads(threads)


def weights(kind: str, shape: tuple[int, int]) -> Tensor:
    w = torch.randn(shape)
    changed = {
        "heavy": lambda: w**3,
        "tiny": lambda: w * 1e-5,
        "one sided": lambda: w.abs() * 100,
        "sparse": lambda: w * (torch.rand(shape) < 0.1),
        "grid": lambda: torch.randint(-8, 8, shape) * 0.25,
        "outlier": lambda: w * torch.where(torch.rand(shape) < 0.02, 1000.0, 1.0),
        "subnormal": lambda: w * 1e-39,
        "zero": lambda: w * 0,
        "huge": lambda: w.clamp(-1, 1) * 65504,
    }
    return changed.get(kind, lambda: w)()


@given(
    name=st.sampled_from(TILED),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    kernels=st.sampled_from(core.usable_kernels()),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_are_those_of_the_codec(
    name: str, kind: str, rows: int, columns: int, kernels: str, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    core.use_kernels(kernels)
    core.set_threads(threads)
    weight = weights(kind, (rows, columns))
    assert torch.equal(encoder.encode(weight, name), get_codec(name).encode(weight))


@pytest.mark.parametrize("kernels", core.usable_kernels())
@pytest.mark.parametrize("name", TILED)
def test_the_sign_of_zero_changes_no_byte(name: str, kernels: str) -> None:
    core.use_kernels(kernels)
    zeros = torch.zeros(17, 40)
    expected = get_codec(name).encode(zeros)
    for weight in (zeros, -zeros, torch.where(torch.rand(17, 40) < 0.5, zeros, -zeros)):
        assert torch.equal(encoder.encode(weight, name), expected)
        assert torch.equal(get_codec(name).encode(weight), expected)


@pytest.mark.parametrize("name", ["tile16:int2g32", "tile16:int3g64z", "tile16:int4g64", "tile16:int8g128"])
def test_a_hundred_thousand_weights_agree_on_every_table(name: str, seed: int) -> None:
    weight = torch.randn(256, 512) * torch.rand(256, 1)
    expected = get_codec(name).encode(weight)
    for kernels in core.usable_kernels():
        core.use_kernels(kernels)
        assert torch.equal(encoder.encode(weight, name), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tile16:int4g64", "tile16:int8g32z", "tile16:mxfp4"])
def test_views_are_read_where_they_lie(name: str, dtype: torch.dtype, seed: int) -> None:
    whole = torch.randn(70, 150).to(dtype)
    for view in (whole, whole.t(), whole[3:40, 5:100], whole.t()[1:90, 2:], whole[::2, ::3], whole[:, :1]):
        assert torch.equal(encoder.encode(view, name), get_codec(name).encode(view))


@pytest.mark.parametrize("name", ["tile16:int4g64", "tile16:int8g32z", "tile16:mxfp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_no_codec_holds_is_left_to_the_codec(name: str, value: float, seed: int) -> None:
    weight = torch.randn(35, 100)
    weight[34, 99] = value
    assert encoder.encode(weight, name) is None


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("suffix", ["", "z"])
def test_the_limit_of_magnitudes_is_that_of_the_codec(width: int, suffix: str) -> None:
    codec = f"tile16:int{width}g32{suffix}"
    limit = 65504.0 * (2**width - 1 if suffix else 2 ** (width - 1) - 1)
    weight = torch.full((1, 32), limit)
    assert torch.equal(encoder.encode(weight, codec), get_codec(codec).encode(weight))
    assert encoder.encode(weight * 1.0001, codec) is None
    with pytest.raises(FormatError, match="keep this matrix in fp32"):
        get_codec(codec).encode(weight * 1.0001)


def test_other_codecs_and_dtypes_are_left_to_the_codec() -> None:
    assert encoder.encode(torch.ones(16, 64), "int4g64") is None
    assert encoder.encode(torch.ones(16, 64, dtype=torch.float64), "tile16:int4g64") is None
    with pytest.raises(FormatError, match="two positive sizes"):
        encoder.encode(torch.ones(64), "tile16:int4g64")


def test_the_binding_refuses_what_it_cannot_write() -> None:
    out, weight = torch.zeros(4096, dtype=torch.uint8), torch.ones(16, 32)
    plain = core.Matrix(out.data_ptr(), 16, 32, "bf16")
    with pytest.raises(ValueError, match="only matrices in tiles"):
        core.encode(plain, weight.data_ptr(), "f32", 32, 1)
    tiles = core.Matrix(out.data_ptr(), 16, 32, "tile16:int4g32")
    with pytest.raises(ValueError, match="f32, bf16 or f16"):
        core.encode(tiles, weight.data_ptr(), "f64", 32, 1)
    with pytest.raises(ValueError, match="one of the strides"):
        core.encode(tiles, weight.data_ptr(), "f32", 64, 2)
