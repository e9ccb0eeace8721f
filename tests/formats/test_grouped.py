import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import GROUPED, random_raw, slow_parts, width_and_group
from gangline.core.errors import FormatError
from gangline.formats import QTensor, get_codec, grouped

names = st.sampled_from(GROUPED)
shapes = st.tuples(st.integers(1, 5), st.one_of(st.integers(1, 300), st.sampled_from([32, 64, 128, 256])))
seeds = st.integers(0, 2**32 - 1)


@given(name=names, shape=shapes, seed=seeds)
def test_bytes_are_codes_then_scales(name: str, shape: tuple[int, int], seed: int) -> None:
    width, group = width_and_group(name)
    rows, columns = shape
    torch.manual_seed(seed)
    tensor = QTensor.from_dense(torch.randn(shape), name)
    assert tensor.nbytes == get_codec(name).nbytes(shape)
    assert tensor.nbytes == rows * (4 * -(-columns * width // 32) + 2 * -(-columns // group))
    if columns % group == 0:
        assert tensor.bits == get_codec(name).bits == width + 16 / group


@given(name=names, shape=shapes, seed=seeds)
def test_decode_is_scale_times_code(name: str, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    raw = random_raw(name, shape)
    codes, scales = slow_parts(name, raw, shape)
    expected = torch.from_numpy(scales.astype(np.float32) * codes.astype(np.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(get_codec(name).decode(raw, shape, dtype), expected.to(dtype))


@given(name=names, shape=shapes, seed=seeds, outlier=st.booleans())
def test_encode_rounds_to_the_nearest_code(
    name: str, shape: tuple[int, int], seed: int, outlier: bool
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    if outlier:
        weight[0, 0] = 1000.0
    raw = get_codec(name).encode(weight)
    codes, scales = slow_parts(name, raw, shape)
    width, _ = width_and_group(name)
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    scales = scales.astype(np.float32)
    assert np.array_equal(codes, np.clip(np.rint(weight.numpy() / scales), low, high))
    error = np.abs(codes * scales.astype(np.float64) - weight.numpy())
    ends = np.stack([low * scales, high * scales])
    beyond = np.maximum(weight.numpy() - ends.max(0), ends.min(0) - weight.numpy())
    # w / scale is rounded to fp32, so a weight halfway between two codes may go either way.
    assert (error <= np.maximum(np.abs(scales) / 2, beyond) + 2e-5 * np.abs(scales)).all()


@given(name=names, shape=shapes, seed=seeds)
def test_encoding_what_was_decoded_changes_no_weight(name: str, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    once = QTensor.from_dense(torch.randn(shape) * 0.02, name).dequantize(torch.float32)
    assert torch.equal(QTensor.from_dense(once, name).dequantize(torch.float32), once)


@pytest.mark.parametrize("name", GROUPED)
def test_result_does_not_depend_on_the_chunk(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 200)
    whole = get_codec(name).encode(weight)
    decoded = get_codec(name).decode(whole, (37, 200), torch.bfloat16)
    monkeypatch.setattr(grouped, "CHUNK", 1000)
    assert torch.equal(get_codec(name).encode(weight), whole)
    assert torch.equal(get_codec(name).decode(whole, (37, 200), torch.bfloat16), decoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_encode_as_their_fp32_values(dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(6, 64).to(dtype)
    assert torch.equal(get_codec("int4g32").encode(weight), get_codec("int4g32").encode(weight.float()))


@pytest.mark.parametrize("name", GROUPED)
def test_zero_weights_decode_to_zero(name: str) -> None:
    decoded = QTensor.from_dense(torch.zeros(3, 96), name).dequantize(torch.float32)
    assert torch.equal(decoded, torch.zeros(3, 96))


def test_a_transposed_view_encodes_as_its_copy(seed: int) -> None:
    weight = torch.randn(64, 48).t()
    assert torch.equal(get_codec("int4g32").encode(weight), get_codec("int4g32").encode(weight.contiguous()))


def test_nan_is_refused_with_the_name_of_the_codec() -> None:
    with pytest.raises(FormatError, match=r"int8g64: .*nan"):
        get_codec("int8g64").encode(torch.full((2, 64), float("nan")))
