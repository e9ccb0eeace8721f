import sys

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.codec_rig import BLOCKS, random_raw
from gangline.core.errors import FormatError
from gangline.formats import QTensor, get_codec, ggml

ENCODED = tuple(name for name in BLOCKS if get_codec(name).encodes)
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 3))


def their_decode(name: str, raw: torch.Tensor, rows: int) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name.removeprefix("ggml:")]
    with np.errstate(over="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy().reshape(rows, -1), kind))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@given(name=st.sampled_from(BLOCKS), size=sizes, seed=seeds)
def test_decode_agrees_with_gguf_bit_for_bit(name: str, size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    codec = get_codec(name)
    shape = (size[0], size[1] * codec.block)
    raw = random_raw(name, shape)
    expected = their_decode(name, raw, shape[0])
    assert same_bits(codec.decode(raw, shape, torch.float32), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(codec.decode(raw, shape, dtype), expected.to(dtype))


def test_every_mxfp4_exponent_decodes_as_in_gguf(seed: int) -> None:
    blocks = torch.randint(0, 256, (256, 17), dtype=torch.uint8)
    blocks[:, 0] = torch.arange(256)
    decoded = get_codec("ggml:MXFP4").decode(blocks.view(-1), (256, 32), torch.float32)
    assert same_bits(decoded, their_decode("ggml:MXFP4", blocks.view(-1), 256))


@pytest.mark.parametrize("name", ["ggml:F32", "ggml:F16", "ggml:BF16"])
def test_plain_types_agree_with_gguf(name: str, seed: int) -> None:
    raw = random_raw(name, (4, 40))
    assert same_bits(get_codec(name).decode(raw, (4, 40), torch.float32), their_decode(name, raw, 4))


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_those_of_gguf(name: str) -> None:
    codec = get_codec(name)
    kind = gguf.GGMLQuantizationType[name.removeprefix("ggml:")]
    assert (codec.block, codec.size) == gguf.GGML_QUANT_SIZES[kind]
    assert codec.nbytes((3, 2 * codec.block)) == 6 * codec.size


@pytest.mark.parametrize("name", ENCODED)
def test_encode_writes_what_gguf_writes(name: str, seed: int) -> None:
    weight = torch.randn(20, 96)
    kind = gguf.GGMLQuantizationType[name.removeprefix("ggml:")]
    expected = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind)).view(-1)
    tensor = QTensor.from_dense(weight, name)
    assert torch.equal(tensor.raw, expected)
    assert tensor.bits == get_codec(name).bits
    assert (tensor.dequantize(torch.float32) - weight).pow(2).mean().sqrt() < 0.15


@pytest.mark.parametrize("name", ["ggml:Q4_0", "ggml:Q8_0"])
def test_encoding_what_was_decoded_changes_no_weight(name: str, seed: int) -> None:
    once = QTensor.from_dense(torch.randn(20, 96), name).dequantize(torch.float32)
    assert torch.equal(QTensor.from_dense(once, name).dequantize(torch.float32), once)


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - set(ENCODED)))
def test_super_blocks_can_only_be_decoded(name: str) -> None:
    with pytest.raises(FormatError, match=r"choose one of ggml:F32, .*ggml:Q8_0"):
        get_codec(name).encode(torch.randn(2, 256))


def test_a_row_that_is_not_whole_blocks_is_refused() -> None:
    with pytest.raises(FormatError, match="blocks of 256 along in, but in is 2880"):
        get_codec("ggml:Q4_K").nbytes((4, 2880))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_past_fp16_are_refused(value: float) -> None:
    weight = torch.randn(2, 32)
    weight[1, 3] = value
    with pytest.raises(FormatError, match=r"ggml:Q8_0: the largest weight is"):
        get_codec("ggml:Q8_0").encode(weight)


def test_only_encoding_needs_the_gguf_package(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    raw = random_raw("ggml:Q4_0", (2, 32))
    assert torch.isfinite(get_codec("ggml:Q4_0").decode(raw, (2, 32), torch.float32)).all()
    with pytest.raises(FormatError, match=r"pip install 'gangline\[gguf\]'"):
        get_codec("ggml:Q4_0").encode(torch.randn(2, 32))


@pytest.mark.parametrize("name", BLOCKS)
def test_result_does_not_depend_on_the_chunk(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_raw(name, (7, 512))
    whole = get_codec(name).decode(raw, (7, 512), torch.float32)
    monkeypatch.setattr(ggml, "CHUNK", 512)
    assert torch.equal(get_codec(name).decode(raw, (7, 512), torch.float32), whole)
