import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.sparse_bytes import multiply_tiles, read_canonical
from gangline.core.errors import FormatError
from gangline.formats import codec_names, get_codec
from gangline.formats.retile import retile, tile_form
from gangline.formats.samoyeds import SamoyedsCodec, SparseCodec, meta_from_lanes, meta_to_lanes
from gangline.formats.samoyeds_arrays import (
    SparseArrays,
    check_arrays,
    compress,
    decompress,
    prune_magnitude,
)
from gangline.formats.samoyeds_pattern import SparsePattern, keep_mask

WORKED = torch.tensor(
    [
        [1, -2, 0, 3, 0.5, 0, 0.25, 0],
        [4, 0, -1, 0, 0, 5, 6, 1],
        [2, 2, 2, 2, 1, 0, 0, 7],
        [-3, 1, 0, 1, 9, -8, 1, 0],
    ]
)
PATTERNS = ("1:1:32", "1:2:16", "1:2:32", "1:2:128", "3:4:32", "4:8:32", "8:16:64", "1:4:128", "5:7:32")
VALUES = ("bf16", "fp16", "int8g32", "int4g32", "int4g128")
patterns = st.sampled_from(PATTERNS)
values = st.sampled_from(VALUES)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 200))
seeds = st.integers(0, 2**32 - 1)


def sparse(shape: tuple[int, int], pattern: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return prune_magnitude(torch.randn(shape), SparsePattern.parse(pattern)).bfloat16()


def test_worked_example_of_the_card() -> None:
    pattern = SparsePattern(1, 2, 4)
    pruned = prune_magnitude(WORKED, pattern)
    arrays = compress(pruned, pattern)
    assert arrays.values_RH.tolist() == [[-2, 3, 5, 6], [2, 2, 9, -8]]
    assert arrays.sub_SR.tolist() == [[0, 0], [1, 1]]
    assert arrays.meta_RQ.tolist() == [[13, 9], [4, 4]]
    dense = decompress(arrays, pattern, (4, 8))
    assert torch.equal(dense, pruned)
    assert (dense @ torch.arange(1.0, 9.0)).tolist() == [8, 72, 6, -3]


@pytest.mark.parametrize(
    ("pattern", "total"),
    [("1:2:16", 34.87), ("1:2:32", 33.95), ("1:2:64", 33.49), ("1:2:128", 33.26), ("4:8:32", 33.95),
     ("8:16:32", 33.95), ("3:4:64", 50.23), ("2:4", 66.06), ("1:4:128", 16.63)],
)  # fmt: skip
def test_bytes_are_those_of_the_card(pattern: str, total: float) -> None:
    """Its table for 14336 x 4096, bf16 values and one byte for a sub-row."""
    codec = SamoyedsCodec(SparsePattern.parse(pattern), get_codec("samoyeds:1:1:32/bf16").values)
    nbytes = codec.nbytes((14336, 4096))
    assert round(nbytes / 1e6, 2) == pytest.approx(total, abs=0.011)
    assert codec.bits == pytest.approx(8 * nbytes / (14336 * 4096))
    assert codec.pattern.sparsity == {"1:4:128": 0.875, "3:4:64": 0.625, "2:4": 0.5}.get(pattern, 0.75)


def test_metadata_lie_in_the_order_of_the_lanes() -> None:
    """Word L: columns 16 (L % 4) ... of row L / 4, and of the row 8 below in the high half."""
    positions_RQ = torch.randint(0, 16, (32, 32), dtype=torch.uint8)
    words_TqL = meta_to_lanes(positions_RQ)
    assert words_TqL.shape == (2, 2, 32)
    for tile, block, lane in [(0, 0, 0), (0, 1, 5), (1, 0, 31), (1, 1, 18)]:
        word = int(words_TqL[tile, block, lane]) & 0xFFFFFFFF
        for half in (0, 1):
            row = positions_RQ[16 * tile + lane // 4 + 8 * half]
            for group in range(4):
                quad = 16 * block + 4 * (lane % 4) + group
                assert (word >> (16 * half + 4 * group)) & 15 == row[quad]
    assert torch.equal(meta_from_lanes(words_TqL), positions_RQ)


def test_golden_bytes_of_the_canonical_arrays() -> None:
    """Row 1 of a block is alive; columns 1 and 3 of its first group. All else fills up."""
    w_OI = torch.zeros(2, 32)
    w_OI[1, 1], w_OI[1, 3] = 1.0, -2.0
    codec = get_codec("samoyeds:1:2:32/bf16")
    assert isinstance(codec, SamoyedsCodec)
    raw = bytes(codec.encode(w_OI).numpy())
    at = codec.offsets((2, 32))
    assert at == {"values": (0, 1024), "meta": (1024, 128), "scales": (1152, 0), "sub": (1152, 32)}
    assert raw[:4] == b"\x80\x3f\x00\xc0"
    assert raw[1024:1032] == b"\x4d\x44\x44\x44\x44\x44\x44\x44"
    assert raw[1152:] == b"\x01" + bytes(31)


def test_golden_bytes_of_the_tiles() -> None:
    w_OI = torch.zeros(4, 64)
    w_OI[1, 1], w_OI[1, 3] = 1.0, -2.0  # lane 0, quad 0: bits 0-3
    w_OI[2, 34], w_OI[2, 55] = 0.5, 4.0  # lane 1, segment 1, quads 0 and 5: bits 0-3 and 12-15
    raw = bytes(get_codec("samoyeds16:1:2:32/bf16").encode(w_OI).numpy())
    assert len(raw) == 64 + 2 * (64 + 512)
    assert raw[:64] == b"\x01" + bytes(63)
    words = [int.from_bytes(raw[at : at + 4], "little") for at in (64, 68, 64 + 576, 68 + 576)]
    assert words == [0x4444444D, 0x44444444, 0x44444444, 0x4444C448]
    assert raw[128:132] == b"\x80\x3f\x00\xc0"
    assert raw[64 + 576 + 64 + 4 : 64 + 576 + 64 + 8] == b"\x00\x00\x00\x3f"
    assert raw[64 + 576 + 64 + 5 * 64 + 4 : 64 + 576 + 64 + 5 * 64 + 8] == b"\x00\x00\x80\x40"


def test_golden_bytes_of_int4_tiles() -> None:
    """Codes 8 +- 1 to 7 with scale 0.5: planes 0 and 1 share bytes, 2 and 3 the next 64."""
    w_OI = torch.zeros(1, 64)
    w_OI[0, 0], w_OI[0, 1] = -4.0, 3.5  # quad 0: planes 0 and 1, byte 0
    w_OI[0, 20], w_OI[0, 23] = 0.5, -0.5  # quad 5: planes 2 and 3, byte 1
    codec = get_codec("samoyeds16:1:1:32/int4g32")
    raw = bytes(codec.encode(w_OI).numpy())
    assert len(raw) == 64 + 2 * (64 + 128)
    assert raw[:4] == b"\x00\x38\x00\x00"
    assert int.from_bytes(raw[64:68], "little") == 0x4444C444
    assert raw[128:132] == b"\xf0\x88\x88\x88"
    assert raw[192:196] == b"\x88\x79\x88\x88"


@given(shapes, patterns, values, seeds)
@settings(max_examples=60)
def test_round_trip(shape: tuple[int, int], pattern: str, kind: str, seed: int) -> None:
    weight = sparse(shape, pattern, seed)
    codec, tiles = get_codec(f"samoyeds:{pattern}/{kind}"), get_codec(f"samoyeds16:{pattern}/{kind}")
    raw = codec.encode(weight)
    assert len(raw) == codec.nbytes(shape)
    found = codec.decode(raw, shape, torch.float32)
    if kind in ("bf16", "fp16"):
        assert torch.equal(found, weight.float())
    else:
        assert not found[weight == 0].any()
    # Coded again, and in the other order, it stays what it is.
    name, other = retile(raw, shape, codec.name) or ("", raw)
    assert name == tiles.name
    assert torch.equal(other, tiles.encode(weight))
    assert torch.equal(tiles.decode(other, shape, torch.float32), found)
    assert isinstance(codec, SparseCodec)
    assert isinstance(tiles, SparseCodec)
    assert torch.equal(codec.write(tiles.read(other, shape), shape), raw)


@given(shapes, patterns, seeds)
@settings(max_examples=40)
def test_masks_are_full_and_best(shape: tuple[int, int], pattern: str, seed: int) -> None:
    torch.manual_seed(seed)
    kind = SparsePattern.parse(pattern)
    score = torch.rand(shape)
    mask = keep_mask(score, kind)
    arrays = compress(score * mask + mask, kind)
    check_arrays(arrays, kind)
    assert torch.equal(decompress(arrays, kind, shape) != 0, mask)
    if shape[0] % kind.m == 0 and shape[1] % kind.v == 0:
        assert float(mask.float().mean()) == pytest.approx(1 - kind.sparsity)
        # No other choice of sub-rows in a block keeps more.
        kept = (score * mask).view(-1, kind.m, shape[1] // kind.v, kind.v).sum(dim=(1, 3))
        best = (
            score.view(-1, kind.m, shape[1] // kind.v, kind.v // 4, 4)
            .topk(2, dim=-1)
            .values.sum(dim=(-1, -2))
        )
        assert torch.allclose(kept, best.topk(kind.n, dim=1).values.sum(dim=1))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["bf16", "int8g32", "int4g32"])
def test_both_layouts_read_number_by_number(pattern: str, kind: str, seed: int) -> None:
    shape = (37, 150)
    weight = sparse(shape, pattern, seed)
    codec = get_codec(f"samoyeds:{pattern}/{kind}")
    raw = codec.encode(weight)
    dense = codec.decode(raw, shape, torch.float32)
    assert torch.equal(read_canonical(raw, shape, codec.name), dense)
    name, tiles = retile(raw, shape, codec.name) or ("", raw)
    x_I = torch.randint(-4, 5, (150,)).double()
    torch.testing.assert_close(multiply_tiles(tiles, shape, name, x_I), dense.double() @ x_I)


@given(patterns, values, seeds, st.data())
@settings(max_examples=30)
def test_slices_are_matrices_of_their_own(pattern: str, kind: str, seed: int, data: st.DataObject) -> None:
    shape = (70, 40)
    m = SparsePattern.parse(pattern).m
    start = data.draw(st.integers(0, (shape[0] - 1) // m)) * m
    stop = min(shape[0], start + m * data.draw(st.integers(1, 70)))
    weight = sparse(shape, pattern, seed)
    for prefix in ("samoyeds", "samoyeds16"):
        codec = get_codec(f"{prefix}:{pattern}/{kind}")
        raw = codec.encode(weight)
        part = codec.decode(codec.slice_rows(raw, shape, start, stop), (stop - start, 40), torch.float32)
        assert torch.equal(part, codec.decode(raw, shape, torch.float32)[start:stop])
    if m > 1:
        with pytest.raises(FormatError, match="cut a block"):
            codec.slice_rows(raw, shape, 1, shape[0])


def test_a_matrix_without_the_pattern_is_refused() -> None:
    with pytest.raises(FormatError, match=r"do not have the pattern 1:2:32.*gangline sparsify"):
        get_codec("samoyeds:1:2:32/bf16").encode(torch.ones(2, 32))
    with pytest.raises(FormatError, match="do not have the pattern"):
        get_codec("samoyeds16:1:1:32/int8g32").encode(torch.ones(1, 4))


def test_negative_zeros_count_as_zeros() -> None:
    weight = torch.full((2, 32), -0.0)
    weight[1, ::4] = 1.0
    codec = get_codec("samoyeds:1:2:32/bf16")
    assert torch.equal(codec.decode(codec.encode(weight), (2, 32), torch.float32), weight)


def test_damage_is_noticed() -> None:
    codec = get_codec("samoyeds:1:2:32/bf16")
    assert isinstance(codec, SamoyedsCodec)
    raw = codec.encode(torch.zeros(2, 32))
    with pytest.raises(FormatError, match="truncated"):
        codec.decode(raw[:-1], (2, 32), torch.float32)
    for part, value, message in [("meta", 0x00, "positions"), ("sub", 2, "sub-rows")]:
        bad = raw.clone()
        bad[codec.offsets((2, 32))[part][0]] = value
        with pytest.raises(FormatError, match=message):
            codec.decode(bad, (2, 32), torch.float32)
    arrays = SparseArrays(
        torch.zeros(2, 2), torch.tensor([[1, 1]], dtype=torch.uint8), torch.tensor([[4], [4]])
    )
    with pytest.raises(FormatError, match="not increasing"):
        check_arrays(arrays, SparsePattern(2, 4, 4))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("samoyeds:3:2:32/bf16", "1 <= N <= M"),
        ("samoyeds:1:2:8/bf16", "V must be a multiple of 16"),
        ("samoyeds:1:2/bf16", "unknown sparse pattern"),
        ("samoyeds:1:2:32/int4", "unknown kind of sparse values"),
        ("samoyeds:1:2:032/bf16", "write samoyeds:1:2:32/bf16"),
        ("samoyed:1:2:32/bf16", "unknown codec"),
    ],
)
def test_wrong_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        get_codec(name)


def test_sparse_codecs_are_found_by_name_only() -> None:
    assert not any("samoyeds" in name for name in codec_names())
    assert tile_form("samoyeds:1:2:32/bf16") == "samoyeds16:1:2:32/bf16"
    assert tile_form("samoyeds16:1:2:32/bf16") is None
