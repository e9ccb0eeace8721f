import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import TILED
from formats.tile_bytes import parse, read_tiles
from gangline.core.errors import FormatError
from gangline.formats import QTensor, get_codec, tiled

INTEGERS = [name for name in TILED if name != "tile16:mxfp4"]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
shapes = st.tuples(st.integers(1, 40), st.integers(1, 140))
seeds = st.integers(0, 2**32 - 1)


def random_parts(name: str, shape: tuple[int, int]) -> tuple[torch.Tensor | None, ...]:
    width, group, has_zeros = parse(name)
    groups = (shape[0], -(-shape[1] // group))
    codes = torch.randint(0, 2**width, shape, dtype=torch.uint8)
    if name == "tile16:mxfp4":
        return codes, torch.randint(100, 140, groups, dtype=torch.uint8)
    if name.endswith("d"):
        return codes, torch.randint(-127, 128, groups, dtype=torch.int8), None, torch.rand(shape[0])
    scales = torch.randn(groups).half()
    return (codes, scales, torch.randint(0, 2**width, groups, dtype=torch.uint8))[: 2 + has_zeros]


def test_golden_bytes_of_int8() -> None:
    """One row, two columns: a head of 64 bytes, then 8 quads of which the first holds the row's codes."""
    raw = get_codec("tile16:int8g32").assemble(
        torch.tensor([[1, 255]], dtype=torch.uint8), torch.tensor([[0.5]]).half()
    )
    expected = bytearray(64 + 8 * 64)
    expected[0:2] = b"\x00\x38"  # 0.5 as fp16
    expected[64:] = b"\x80" * 512  # zero is 128
    expected[64:66] = b"\x01\xff"
    assert bytes(raw.numpy()) == bytes(expected)
    w = get_codec("tile16:int8g32").decode(raw, (1, 2), torch.float32)
    assert w.tolist() == [[-63.5, 63.5]]


def test_golden_bytes_of_int4_with_zero_points() -> None:
    """Two rows of 8 columns: quads 0 and 1 share bytes; row 1 is at the positions 4 to 7."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[1.0], [2.0]]).half(), torch.tensor([[3], [5]], dtype=torch.uint8)
    raw = get_codec("tile16:int4g32z").assemble(codes, scales, zeros)
    expected = bytearray(64 + 256)
    expected[0:4] = b"\x00\x3c\x00\x40"
    expected[32:34] = b"\x03\x05"
    expected[64:72] = b"\x40\x51\x62\x73\xc8\xd9\xea\xfb"
    for first in (128, 192, 256):  # columns past the end have the code of zero
        expected[first : first + 8] = b"\x33\x33\x33\x33\x55\x55\x55\x55"
    assert bytes(raw.numpy()) == bytes(expected)
    w = get_codec("tile16:int4g32z").decode(raw, (2, 8), torch.float32)
    assert w.tolist() == [[-3, -2, -1, 0, 1, 2, 3, 4], [6, 8, 10, 12, 14, 16, 18, 20]]


def test_golden_bytes_of_int3() -> None:
    """Row 0, columns 0, 4, ..., 28 hold 7, 6, ..., 0: low bits of quads 0-3 and 4-7, then all high bits."""
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0, ::4] = torch.arange(7, -1, -1, dtype=torch.uint8)
    raw = get_codec("tile16:int3g32").assemble(codes, torch.ones(16, 1).half())
    expected = bytearray(64 + 3 * 64)
    expected[:32] = b"\x00\x3c" * 16
    expected[64] = 0b00_01_10_11  # 7, 6, 5, 4 without their high bits, the first lowest
    expected[128] = 0b00_01_10_11
    expected[192] = 0b00001111
    assert bytes(raw.numpy()) == bytes(expected)


def test_golden_bytes_of_int2_and_mxfp4() -> None:
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    codes[15, 32 + 3 :: 4] = torch.tensor([3, 2, 1, 0, 0, 1, 2, 3], dtype=torch.uint8)
    raw = get_codec("tile16:int2g32").assemble(codes, torch.zeros(16, 2).half())
    expected = bytearray(64 + 4 * 64)  # two groups of two times 64 bytes
    expected[64 + 128 + 63] = 0b00_01_10_11
    expected[64 + 192 + 63] = 0b11_10_01_00
    assert bytes(raw.numpy()) == bytes(expected)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 28:] = torch.tensor([15, 1, 2, 9], dtype=torch.uint8)
    raw = get_codec("tile16:mxfp4").assemble(codes, torch.tensor([[128]], dtype=torch.uint8))
    expected = bytearray(64 + 256)
    expected[0] = 128
    expected[64 + 192 : 64 + 196] = b"\xf0\x10\x20\x90"  # quad 7 in the high nibbles
    assert bytes(raw.numpy()) == bytes(expected)
    w = get_codec("tile16:mxfp4").decode(raw, (1, 32), torch.float32)
    assert w[0, 28:].tolist() == [-12.0, 1.0, 2.0, -1.0]


@given(name=st.sampled_from(TILED), shape=shapes, seed=seeds)
def test_codes_and_scales_survive(name: str, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    codec = get_codec(name)
    parts = random_parts(name, shape)
    raw = codec.assemble(*parts)
    assert raw.numel() == codec.nbytes(shape) and raw.numel() % 64 == 0
    codes, scales, zeros = read_tiles(name, raw, shape)
    assert np.array_equal(codes, parts[0].numpy())
    if name.endswith("d"):
        stored = parts[1].float() * parts[3][:, None]
    else:
        stored = parts[1]
    assert np.array_equal(scales, stored.double().numpy())
    if len(parts) == 3:
        assert np.array_equal(zeros, parts[2].numpy())
    group = parse(name)[1]
    scales, zeros = (np.repeat(part, group, axis=1)[:, : shape[1]] for part in (scales, zeros))
    if name == "tile16:mxfp4":
        expected = E2M1[codes] * 2.0 ** (scales - 127)
    elif name.endswith("d"):
        bytes_OI = np.repeat(parts[1].numpy(), group, axis=1)[:, : shape[1]].astype(np.float32)
        expected = bytes_OI * (codes - zeros) * parts[3].numpy()[:, None].astype(np.float64)
    else:
        expected = scales * (codes - zeros)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected_OI = torch.from_numpy(expected.astype(np.float32)).to(dtype)
        assert torch.equal(codec.decode(raw, shape, dtype), expected_OI)


@given(name=st.sampled_from(TILED), shape=shapes, seed=seeds)
def test_what_fills_up_a_matrix_adds_nothing(name: str, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    codec = get_codec(name)
    group = parse(name)[1]
    whole = (-(-shape[0] // 16) * 16, -(-shape[1] // group) * group)
    weight = torch.randn(shape)
    for raw in (codec.assemble(*random_parts(name, shape)), codec.encode(weight)):
        w = codec.decode(raw, whole, torch.float32)
        assert torch.count_nonzero(w[shape[0] :]) == torch.count_nonzero(w[:, shape[1] :]) == 0
        _, scales, _ = read_tiles(name, raw, whole)
        assert not scales[shape[0] :].any()


@given(name=st.sampled_from([n for n in INTEGERS if n[-1] not in "zd"]), shape=shapes, seed=seeds)
def test_symmetric_tiles_are_the_grouped_codec_in_another_order(
    name: str, shape: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape) ** 3
    tiles = QTensor.from_dense(weight, name)
    rows = QTensor.from_dense(weight, name.removeprefix("tile16:"))
    assert torch.equal(tiles.dequantize(torch.float32), rows.dequantize(torch.float32))


@pytest.mark.parametrize("name", [n for n in INTEGERS if n.endswith("z")])
def test_zero_points_lower_the_error_of_weights_on_one_side(name: str, seed: int) -> None:
    weight = torch.rand(64, 256) + 0.5
    lost = [
        (QTensor.from_dense(weight, codec).dequantize(torch.float32) - weight).pow(2).mean()
        for codec in (name, name.removesuffix("z"))
    ]
    # With a negative scale two bits have two levels on that side without a zero point, and three with one.
    assert lost[0] < lost[1] * (0.75 if "int2" in name else 0.5)


@given(name=st.sampled_from([n for n in INTEGERS if n.endswith("d")]), shape=shapes, seed=seeds)
def test_byte_scales_are_the_searched_ones_rounded(name: str, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    _, found, _ = read_tiles(name, get_codec(name).encode(weight), shape)
    plain = name.removesuffix("d")
    _, searched, _ = read_tiles(plain, get_codec(plain).encode(weight), shape)
    unit = np.abs(searched).max(axis=1, keepdims=True) / 127
    assert np.array_equal(np.sign(found), np.sign(searched))
    assert (np.abs(np.abs(found) - np.maximum(np.abs(searched), unit)) <= unit * 0.50001).all()


@given(name=st.sampled_from(INTEGERS), shape=shapes, seed=seeds)
def test_encode_rounds_to_the_nearest_code(name: str, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    codes, scales, zeros = read_tiles(name, get_codec(name).encode(weight), shape)
    width, group, _ = parse(name)
    scales, zeros = (np.repeat(part, group, axis=1)[:, : shape[1]] for part in (scales, zeros))
    steps = np.rint(weight.numpy() / scales.astype(np.float32))
    assert np.array_equal(codes, np.clip(steps + zeros, 0, 2**width - 1))
    assert zeros.min() >= 0 and zeros.max() < 2**width


@given(shape=shapes, seed=seeds, spread=st.sampled_from([1e-30, 1e-2, 1.0, 1e30]))
def test_mxfp4_rounds_to_the_nearest_and_clips_little(
    shape: tuple[int, int], seed: int, spread: float
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape) * spread
    _, exponents, _ = read_tiles("tile16:mxfp4", get_codec("tile16:mxfp4").encode(weight), shape)
    w_hat = QTensor.from_dense(weight, "tile16:mxfp4").dequantize(torch.float32)
    scale = np.repeat(2.0 ** (exponents - 127), 32, axis=1)[:, : shape[1]]
    x = weight.double().numpy() / scale
    nearest = E2M1[np.abs(x[..., None] - E2M1).argmin(-1)]
    assert np.allclose(np.abs(w_hat.double().numpy() / scale - x), np.abs(nearest - x), atol=1e-6)
    assert np.abs(x).max() < 8


def test_mxfp4_keeps_what_it_can_hold(seed: int) -> None:
    codes = torch.randint(0, 16, (20, 96), dtype=torch.uint8)
    exponents = torch.randint(60, 190, (20, 3), dtype=torch.uint8)
    codec = get_codec("tile16:mxfp4")
    w = codec.decode(codec.assemble(codes, exponents), (20, 96), torch.float32)
    assert torch.equal(codec.decode(codec.encode(w), (20, 96), torch.float32), w)


@pytest.mark.parametrize("name", ["tile16:int4g64", "tile16:int3g32z", "tile16:mxfp4"])
def test_result_does_not_depend_on_the_chunk(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(53, 200)
    whole = get_codec(name).encode(weight)
    decoded = get_codec(name).decode(whole, (53, 200), torch.bfloat16)
    monkeypatch.setattr(tiled, "CHUNK", 5000)
    assert torch.equal(get_codec(name).encode(weight), whole)
    assert torch.equal(get_codec(name).decode(whole, (53, 200), torch.bfloat16), decoded)


@pytest.mark.parametrize("name", ["tile16:int8g64", "tile16:int2g32z", "tile16:mxfp4"])
def test_whole_row_blocks_are_sliced_without_a_copy(name: str, seed: int) -> None:
    raw = get_codec(name).encode(torch.randn(60, 70))
    part = get_codec(name).slice_rows(raw, (60, 70), 16, 48)
    assert part.data_ptr() == raw.data_ptr() + get_codec(name).nbytes((16, 70))
    tail = get_codec(name).slice_rows(raw, (60, 70), 48, 60)
    assert tail.data_ptr() + tail.numel() == raw.data_ptr() + raw.numel()


@pytest.mark.parametrize("name", TILED)
def test_zero_weights_decode_to_zero(name: str) -> None:
    decoded = QTensor.from_dense(torch.zeros(3, 96), name).dequantize(torch.float32)
    assert torch.equal(decoded, torch.zeros(3, 96))


@pytest.mark.parametrize("name", ["tile16:int8g64", "tile16:int4g32z", "tile16:mxfp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(name: str, value: float) -> None:
    weight = torch.randn(5, 64)
    weight[4, 63] = value
    with pytest.raises(FormatError, match=f"{name}: .*nan or infinite"):
        get_codec(name).encode(weight)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_ranges_past_an_fp16_scale_are_refused(width: int) -> None:
    limit = 65504.0 * (2**width - 1)
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([-limit / 4, limit * 3 / 4])
    codec = get_codec(f"tile16:int{width}g32z")
    assert torch.isfinite(codec.decode(codec.encode(weight), (1, 32), torch.float32)).all()
    with pytest.raises(FormatError, match="keep this matrix in fp32"):
        codec.encode(weight * 1.01)
