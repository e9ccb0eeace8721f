"""ggml blocks into tiles in native code: the bytes that torch makes, apart from the blocks and in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import random_raw
from gangline.core.errors import FormatError
from gangline.formats import get_codec
from gangline.formats import retile as torch_retile
from gangline.kernels.cpu import native
from gangline.kernels.cpu.retiler import form_in_place, retile, retile_in_place

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

BLOCKS = ("ggml:Q4_0", "ggml:Q8_0", "ggml:MXFP4")


@given(
    codec=st.sampled_from(BLOCKS),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 11),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_are_those_of_torch(codec: str, rows: int, blocks: int, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (rows, 32 * blocks)
    raw = random_raw(codec, shape)
    found, wanted = retile(raw, shape, codec), torch_retile.retile(raw, shape, codec)
    assert found is not None and wanted is not None
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("codec", BLOCKS)
@pytest.mark.parametrize("shift", [0, 32, 63])
def test_tiles_take_the_place_of_their_blocks(codec: str, shift: int, seed: int) -> None:
    shape = (48, 256)
    raw = random_raw(codec, shape)
    name = form_in_place(shape, codec)
    assert name is not None
    room = torch.full((len(raw) + 200,), 77, dtype=torch.uint8)
    place = room[100 : 100 + len(raw)]
    place.copy_(raw)
    tiles = retile_in_place(place, shape, codec, shift)
    assert tiles.data_ptr() == place.data_ptr() - shift
    was = get_codec(codec).decode(raw, shape, torch.float32)
    now = get_codec(name).decode(tiles, shape, torch.float32)
    assert torch.equal(was.view(torch.int32), now.view(torch.int32))
    assert bool((room[: 100 - shift] == 77).all()) and bool((room[100 + len(raw) :] == 77).all())


def test_tiles_of_another_size_have_no_place() -> None:
    assert form_in_place((48, 64), "ggml:Q4_0") == "tile16:int4g32"
    assert form_in_place((40, 64), "ggml:Q4_0") is None
    assert form_in_place((48, 96), "ggml:Q4_0") is None
    assert form_in_place((48, 64), "ggml:MXFP4") is None
    assert form_in_place((48, 256), "ggml:Q4_K") is None
    assert form_in_place((48, 256), "bf16") is None
    raw = random_raw("ggml:Q4_0", (40, 64))
    with pytest.raises(ValueError, match="another size"):
        core.retile_in_place("ggml:Q4_0", raw.data_ptr(), raw.data_ptr(), 40, 64)
    with pytest.raises(ValueError, match="no tile form"):
        core.retile("ggml:Q4_K", raw.data_ptr(), raw.data_ptr(), 16, 256)


def test_an_exponent_that_tiles_read_as_nan_is_refused(seed: int) -> None:
    raw = random_raw("ggml:MXFP4", (16, 128))
    raw[17 * 20] = 255
    with pytest.raises(FormatError, match="exponent 255"):
        retile(raw, (16, 128), "ggml:MXFP4")
    with pytest.raises(FormatError, match="exponent 255"):
        retile_in_place(raw, (16, 128), "ggml:MXFP4")


def test_other_codecs_go_through_torch(seed: int) -> None:
    raw = random_raw("int4g32", (20, 64))
    found, wanted = retile(raw, (20, 64), "int4g32"), torch_retile.retile(raw, (20, 64), "int4g32")
    assert found is not None and wanted is not None
    assert torch.equal(found[1], wanted[1])
    assert retile(random_raw("ggml:Q4_1", (20, 64)), (20, 64), "ggml:Q4_1") is None
