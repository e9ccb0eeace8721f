"""ggml blocks multiplied where they lie, on every usable instruction set.

Shape suffixes: T tokens, O rows, I columns, G groups of 32 columns.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from formats.codec_rig import HALF_FIELDS
from gangline.formats import get_codec
from gangline.kernels.cpu import native
from kernels.tile_rig import quantize

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

UNITS = {"ggml:Q4_0": 32, "ggml:Q8_0": 32, "ggml:Q4_K": 256, "ggml:Q5_K": 256, "ggml:Q6_K": 256}
BYTES = {"ggml:Q4_0": 18, "ggml:Q8_0": 34, "ggml:Q4_K": 144, "ggml:Q5_K": 176, "ggml:Q6_K": 210}
SUPER = ("ggml:Q4_K", "ggml:Q5_K", "ggml:Q6_K")


@pytest.fixture(params=core.usable_kernels())
def table(request: pytest.FixtureRequest):
    before = core.kernels_name()
    core.use_kernels(request.param)
    yield request.param
    core.use_kernels(before)


def random_blocks(codec: str, rows: int, cols: int) -> Tensor:
    """Any bytes are blocks, as long as the scales are sensible numbers."""
    blocks_NB = torch.randint(0, 256, (rows * cols // UNITS[codec], BYTES[codec]), dtype=torch.uint8)
    for place in HALF_FIELDS[codec]:
        halves_N1 = (torch.randn(len(blocks_NB), 1) * 0.1).half()
        blocks_NB[:, place : place + 2] = halves_N1.view(torch.uint8)
    return blocks_NB.view(-1)


def multiply(raw: Tensor, rows: int, cols: int, codec: str, x_TI: Tensor, shift: int = 0) -> Tensor:
    space = torch.empty(len(raw) + 128, dtype=torch.uint8)
    at = -space.data_ptr() % 64 + shift
    space[at : at + len(raw)] = raw
    y_TO = torch.full((len(x_TI), rows), torch.nan)
    matrix = core.Matrix(space.data_ptr() + at, rows, cols, codec)
    core._matmul(matrix, x_TI.data_ptr(), len(x_TI), y_TO.data_ptr())
    return y_TO


def assert_product(raw: Tensor, rows: int, cols: int, codec: str, x_TI: Tensor, y_TO: Tensor) -> None:
    """Against fp64 with activations rounded to int8 groups: only fp32 sums are left to differ."""
    group = 128 if codec in SUPER else 32
    q_TI, scale_TG = quantize(x_TI.numpy(), group)[:2]
    x_hat_TI = q_TI.astype(np.float64) * np.repeat(scale_TG.astype(np.float64), group, axis=1)
    w_OI = get_codec(codec).decode(raw, (rows, cols), torch.float32).double().numpy()
    magnitude = np.abs(x_hat_TI) @ np.abs(w_OI).T
    if codec in SUPER:  # what scales and mins cancel
        magnitude = np.abs(x_hat_TI).sum(1, keepdims=True) * np.abs(w_OI).max() * 4
    assert (np.abs(y_TO.numpy() - x_hat_TI @ w_OI.T) <= 2e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize("codec", UNITS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 33, 131])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 8), (19, 9), (50, 1)])
def test_products_are_right(codec: str, tokens: int, shape: tuple[int, int], table: str, seed: int) -> None:
    rows, cols = shape[0], shape[1] * UNITS[codec]
    raw = random_blocks(codec, rows, cols)
    x_TI = torch.randn(tokens, cols)
    assert_product(raw, rows, cols, codec, x_TI, multiply(raw, rows, cols, codec, x_TI))


@pytest.mark.parametrize("codec", UNITS)
def test_results_do_not_depend_on_alignment_tokens_or_threads(codec: str, table: str, seed: int) -> None:
    rows, cols = 37, 5 * UNITS[codec]
    raw, x_TI = random_blocks(codec, rows, cols), torch.randn(7, cols)
    want = multiply(raw, rows, cols, codec, x_TI)
    before = core.threads()
    try:
        for shift, threads in ((1, 1), (2, 2), (63, 3)):
            core.set_threads(threads)
            assert torch.equal(multiply(raw, rows, cols, codec, x_TI, shift), want)
    finally:
        core.set_threads(before)
    for several in (1, 2, 3, 5):
        parts = [multiply(raw, rows, cols, codec, part_TI) for part_TI in x_TI.split(several)]
        assert torch.equal(torch.cat(parts), want)


@pytest.mark.parametrize("codec", SUPER)
def test_super_blocks_give_the_same_bits_on_every_instruction_set(codec: str, seed: int) -> None:
    rows, cols = 21, 3 * 256
    raw, x_TI = random_blocks(codec, rows, cols), torch.randn(9, cols)
    before = core.kernels_name()
    try:
        found = []
        for name in core.usable_kernels():
            core.use_kernels(name)
            found.append(multiply(raw, rows, cols, codec, x_TI))
    finally:
        core.use_kernels(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("codec", SUPER)
def test_weights_are_those_of_the_gguf_package(codec: str, table: str, seed: int) -> None:
    gguf = pytest.importorskip("gguf")
    rows, cols = 18, 512
    raw = random_blocks(codec, rows, cols)
    kind = gguf.GGMLQuantizationType[codec.removeprefix("ggml:")]
    w_OI = torch.from_numpy(gguf.quants.dequantize(raw.view(rows, -1).numpy(), kind)).double()
    # A row of activations with one number 127 is rounded to itself.
    x_TI = torch.zeros(cols, cols)
    x_TI.fill_diagonal_(127.0)
    y_TO = multiply(raw, rows, cols, codec, x_TI).double() / 127
    assert torch.allclose(y_TO.T, w_OI, rtol=1e-5, atol=2e-5 * float(w_OI.abs().max()))


@pytest.mark.parametrize("codec", UNITS)
@pytest.mark.parametrize("byte", [0, 0x7F, 0x80, 0xFF])
def test_extreme_codes_and_activations(codec: str, byte: int, table: str) -> None:
    """Every product as large as it can be: no intermediate integer overflows."""
    rows, cols = 6, 2 * UNITS[codec]
    blocks_NB = torch.full((rows * cols // UNITS[codec], BYTES[codec]), byte, dtype=torch.uint8)
    for place, value in zip(HALF_FIELDS[codec], (1.0, -0.5), strict=False):
        blocks_NB[:, place : place + 2] = torch.tensor([value]).half().view(torch.uint8)
    x_TI = torch.stack([torch.full((cols,), v) for v in (3.0, -3.0, 0.0, 1e-30)])
    raw = blocks_NB.view(-1)
    assert_product(raw, rows, cols, codec, x_TI, multiply(raw, rows, cols, codec, x_TI))


@pytest.mark.parametrize("codec", ["ggml:Q4_0", "ggml:Q8_0"])
def test_encoded_weights_multiply_as_their_decoded_form(codec: str, table: str, seed: int) -> None:
    pytest.importorskip("gguf")
    w_OI = torch.randn(40, 96)
    raw = get_codec(codec).encode(w_OI)
    x_TI = torch.randn(3, 96)
    assert_product(raw, 40, 96, codec, x_TI, multiply(raw, 40, 96, codec, x_TI))


def test_columns_must_be_whole_blocks() -> None:
    raw = torch.zeros(4096, dtype=torch.uint8)
    for codec, unit in UNITS.items():
        with pytest.raises(ValueError, match="cannot have"):
            core.Matrix(raw.data_ptr(), 2, unit + 16, codec)
