import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import random_raw
from gangline.core.errors import FormatError
from gangline.formats import get_codec, mx

MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def one_block(codes: list[int], scale: int) -> torch.Tensor:
    return torch.tensor([*codes, scale], dtype=torch.uint8)


def test_golden_byte_of_gpt_oss() -> None:
    raw = one_block([0xA3] + [0] * 15, 126)
    decoded = get_codec("mxfp4").decode(raw, (1, 32), torch.bfloat16)
    assert decoded[0].tolist() == [0.75, -0.5] + [0.0] * 30


@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_decode_reads_low_nibbles_first(rows: int, blocks: int, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (rows, 32 * blocks)
    raw = random_raw("mxfp4", shape)
    data = raw.tolist()
    scales = data[rows * blocks * 16 :]
    expected = torch.zeros(rows * shape[1])
    for i in range(len(expected)):
        nibble = data[i // 2] >> (4 * (i % 2)) & 15
        value = math.ldexp(MAGNITUDES[nibble & 7], scales[i // 32] - 127)
        expected[i] = -value if nibble & 8 else value
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = get_codec("mxfp4").decode(raw, shape, dtype)
        assert torch.equal(decoded, expected.view(shape).to(dtype))


@pytest.mark.parametrize("scale", [0, 1, 2, 127, 252])
def test_extreme_exponents_stay_exact(scale: int) -> None:
    raw = one_block([0x17] + [0] * 15, scale)
    decoded = get_codec("mxfp4").decode(raw, (1, 32), torch.bfloat16)
    assert decoded[0, :2].tolist() == [math.ldexp(6, scale - 127), math.ldexp(0.5, scale - 127)]


def test_the_reserved_exponent_is_nan() -> None:
    decoded = get_codec("mxfp4").decode(one_block([0x22] * 16, 255), (1, 32), torch.float32)
    assert decoded.isnan().all()


def test_ggml_orders_the_nibbles_otherwise(seed: int) -> None:
    raw = random_raw("mxfp4", (3, 64))
    codes, scales = raw[:96].view(6, 16), raw[96:].view(6, 1)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=2).view(6, 32)
    blocks = torch.cat([scales, nibbles[:, :16] | (nibbles[:, 16:] << 4)], dim=1)
    ours = get_codec("mxfp4").decode(raw, (3, 64), torch.float32)
    assert torch.equal(get_codec("ggml:MXFP4").decode(blocks.view(-1), (3, 64), torch.float32), ours)


def test_result_does_not_depend_on_the_chunk(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_raw("mxfp4", (7, 96))
    whole = get_codec("mxfp4").decode(raw, (7, 96), torch.float32)
    monkeypatch.setattr(mx, "CHUNK", 64)
    assert torch.equal(get_codec("mxfp4").decode(raw, (7, 96), torch.float32), whole)


def test_encoding_is_refused_with_the_way_out() -> None:
    with pytest.raises(FormatError, match="choose tile16:mxfp4 or ggml:MXFP4"):
        get_codec("mxfp4").encode(torch.randn(2, 32))
