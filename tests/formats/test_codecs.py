"""What holds for every codec alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import ALL, DENSE, TILED, random_raw
from gangline.core.errors import FormatError
from gangline.formats import QTensor, dense_codec_name, get_codec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
every = pytest.mark.parametrize("name", ALL)


@given(name=st.sampled_from(ALL), offset=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_bytes_may_start_anywhere_in_a_buffer(name: str, offset: int, seed: int) -> None:
    torch.manual_seed(seed)
    raw = random_raw(name, (3, 256))
    buffer = torch.zeros(raw.numel() + 80, dtype=torch.uint8)
    buffer[offset : offset + raw.numel()] = raw
    decoded = get_codec(name).decode(buffer[offset : offset + raw.numel()], (3, 256), torch.float32)
    assert torch.equal(decoded, get_codec(name).decode(raw, (3, 256), torch.float32))


@given(name=st.sampled_from(ALL), rows=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_row_slices_are_slices_of_the_decoded(name: str, rows: int, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    tensor = QTensor((rows, 256), name, random_raw(name, (rows, 256)))
    part = tensor.slice_rows(start, stop)
    assert part.shape == (stop - start, 256)
    assert part.nbytes == get_codec(name).nbytes(part.shape)
    whole = tensor.dequantize(torch.bfloat16)
    assert torch.equal(part.dequantize(torch.bfloat16), whole[start:stop])


@every
def test_true_bits_count_every_byte(name: str, seed: int) -> None:
    tensor = QTensor((16, 512), name, random_raw(name, (16, 512)))
    of_rows = 32 / 512 if name in TILED and name.endswith("d") else 0  # one fp32 scale a row
    assert tensor.bits == get_codec(name).bits + of_rows
    assert tensor.nbytes == get_codec(name).nbytes((16, 512))


@every
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_bytes_is_refused(name: str, change: int) -> None:
    size = get_codec(name).nbytes((2, 256)) + change
    with pytest.raises(FormatError, match=rf"takes {size - change} bytes, got {size}"):
        get_codec(name).decode(torch.zeros(size, dtype=torch.uint8), (2, 256), torch.float32)
    with pytest.raises(FormatError, match=rf"takes {size - change} bytes, got {size}"):
        get_codec(name).slice_rows(torch.zeros(size, dtype=torch.uint8), (2, 256), 0, 1)


@every
def test_bytes_of_another_dtype_or_rank_are_refused(name: str) -> None:
    size = get_codec(name).nbytes((2, 256))
    for raw in (torch.zeros(size, dtype=torch.int8), torch.zeros(2, size // 2, dtype=torch.uint8)):
        with pytest.raises(FormatError, match="must be uint8 in one dimension"):
            get_codec(name).decode(raw, (2, 256), torch.float32)


@every
@pytest.mark.parametrize("shape", [(0, 256), (4, 0), (-1, 256), (4,), (2, 2, 256)])
def test_what_is_no_matrix_is_refused(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="two positive sizes"):
        get_codec(name).nbytes(shape)


@every
@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (1, 1), (2, 1), (0, 5)])
def test_rows_outside_of_the_matrix_are_refused(name: str, start: int, stop: int) -> None:
    raw = random_raw(name, (4, 256))
    with pytest.raises(FormatError, match="not a part of a matrix of 4 rows"):
        get_codec(name).slice_rows(raw, (4, 256), start, stop)


@pytest.mark.parametrize("name", [name for name in ALL if name != "mxfp4"])
def test_integer_weights_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="only floating weights"):
        get_codec(name).encode(torch.ones(2, 256, dtype=torch.int32))


@pytest.mark.parametrize("name", ["int5g32", "int4g16", "ggml:IQ2_XS", "", "fp8"])
def test_an_unknown_codec_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(FormatError, match=r"known: bf16, .*int4g32.*ggml:Q4_K.*mxfp4"):
        get_codec(name)


@pytest.mark.parametrize("name", DTYPES)
def test_dense_of_the_same_dtype_shares_memory(name: str, seed: int) -> None:
    weight = torch.randn(6, 10).to(DTYPES[name])
    assert dense_codec_name(weight.dtype) == name
    raw = get_codec(name).encode(weight)
    decoded = get_codec(name).decode(raw, (6, 10), weight.dtype)
    assert decoded.data_ptr() == raw.data_ptr() == weight.data_ptr()
    assert torch.equal(decoded, weight)
    part = get_codec(name).slice_rows(raw, (6, 10), 2, 4)
    assert part.data_ptr() == weight[2].data_ptr()


@pytest.mark.parametrize("name", DENSE)
def test_dense_bytes_survive_a_round_trip(name: str, seed: int) -> None:
    raw = random_raw(name, (5, 9))
    assert torch.equal(get_codec(name).encode(get_codec(name).decode(raw, (5, 9), torch.float32)), raw)


def test_a_dtype_without_a_dense_codec_is_refused() -> None:
    with pytest.raises(FormatError, match="float64"):
        dense_codec_name(torch.float64)
