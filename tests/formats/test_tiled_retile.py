import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import GROUPED, random_raw
from gangline.core.errors import FormatError
from gangline.formats import codec_names, get_codec, retile
from gangline.formats.retile import retile as to_tiles
from gangline.formats.retile import tile_form

BLOCKS = ("mxfp4", "ggml:Q4_0", "ggml:Q8_0", "ggml:MXFP4")


def same_bits(raw: torch.Tensor, shape: tuple[int, int], codec: str) -> bool:
    name, tiles = to_tiles(raw, shape, codec)
    assert name == tile_form(codec)
    was, now = (
        get_codec(c).decode(r, shape, torch.float32).view(torch.int32)
        for c, r in ((codec, raw), (name, tiles))
    )
    return torch.equal(was, now)


@given(
    codec=st.sampled_from([*GROUPED, *BLOCKS]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_bit_of_a_weight_changes(codec: str, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (rows, columns if codec in GROUPED else -(-columns // 32) * 32)
    assert same_bits(random_raw(codec, shape), shape, codec)


def test_no_bit_changes_in_a_matrix_of_many_chunks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retile, "CHUNK", 2000)
    for codec in ("int3g64", *BLOCKS):
        assert same_bits(random_raw(codec, (90, 96)), (90, 96), codec)


def test_every_negative_and_subnormal_scale_of_a_block_survives(seed: int) -> None:
    blocks = torch.randint(0, 256, (64, 18), dtype=torch.uint8)
    blocks[:, :2] = torch.randint(0, 0x7C00, (64, 1)).to(torch.int16).bitwise_or_(-0x8000).view(torch.uint8)
    assert same_bits(blocks.view(-1), (16, 128), "ggml:Q4_0")


def test_every_exponent_of_mxfp4_survives() -> None:
    codes = torch.randint(0, 256, (256, 16), dtype=torch.uint8)
    raw = torch.cat([codes.view(-1), torch.arange(256, dtype=torch.uint8)])
    _, tiles = to_tiles(raw, (256, 32), "mxfp4")
    was = get_codec("mxfp4").decode(raw, (256, 32), torch.float32)
    now = get_codec("tile16:mxfp4").decode(tiles, (256, 32), torch.float32)
    assert torch.equal(was.nan_to_num(nan=7.0), now.nan_to_num(nan=7.0))
    assert now[255].isnan().all() and not now[:255].isnan().any()


def test_an_exponent_that_tiles_read_as_nan_is_refused() -> None:
    raw = random_raw("ggml:MXFP4", (2, 64))
    raw[17] = 255
    with pytest.raises(FormatError, match="exponent 255"):
        to_tiles(raw, (2, 64), "ggml:MXFP4")


def test_other_codecs_have_no_tile_form() -> None:
    rest = [name for name in codec_names() if name not in GROUPED and name not in BLOCKS]
    assert "ggml:Q4_1" in rest and "bf16" in rest and "tile16:int4g32" in rest
    for name in rest:
        assert tile_form(name) is None
        assert to_tiles(torch.empty(0, dtype=torch.uint8), (16, 256), name) is None


def test_wrong_bytes_are_refused() -> None:
    with pytest.raises(FormatError, match="takes 1152 bytes, got 1151"):
        to_tiles(torch.zeros(1151, dtype=torch.uint8), (16, 128), "ggml:Q4_0")
