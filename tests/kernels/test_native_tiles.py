"""Tiled kernels against integer arithmetic in numpy, for every format, instruction set and odd shape."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from gangline.formats import get_codec
from gangline.kernels.cpu import native
from kernels.tile_rig import CODECS, Tiled, expected, make, pack, quantize

core = native()
if core is None:
    pytest.skip("the native CPU core is not built here", allow_module_level=True)

TOKENS = (1, 2, 3, 7, 33)
SHAPES = ((1, 1), (5, 100), (16, 32), (17, 33), (40, 300), (1, 256), (51, 3))


@pytest.fixture(params=core.usable_kernels())
def table(request: pytest.FixtureRequest):
    before = core.kernels_name()
    core.use_kernels(request.param)
    yield request.param
    core.use_kernels(before)


@pytest.fixture(autouse=True)
def restore_threads():
    before = core.threads()
    yield
    core.set_threads(before)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def multiply(w: Tiled, x_TI: np.ndarray, shift: int = 64) -> np.ndarray:
    """The kernel's product; the weights begin ``shift`` bytes after a multiple of 64."""
    space = np.zeros(len(w.raw) + 192, np.uint8)
    at = -space.ctypes.data % 64 + shift
    space[at : at + len(w.raw)] = w.raw
    x = np.ascontiguousarray(x_TI, dtype=np.float32)
    y = np.full((len(x), w.rows), np.nan, np.float32)
    matrix = core.Matrix(space.ctypes.data + at, w.rows, w.cols, w.kind.name)
    core._matmul(matrix, x.ctypes.data, len(x), y.ctypes.data)
    return y


def assert_close(w: Tiled, x_TI: np.ndarray, y_TO: np.ndarray) -> None:
    wanted, magnitude = expected(w, x_TI)
    # One rounding a group and product, relative to what was summed.
    assert (np.abs(y_TO - wanted) <= 1e-6 * magnitude + 1e-30).all(), np.abs(y_TO - wanted).max()


@pytest.mark.parametrize("name", CODECS)
def test_products_of_every_shape(name, table, rng):
    for rows, cols in SHAPES:
        w = make(name, rows, cols, rng)
        x = rng.standard_normal((max(TOKENS), cols)).astype(np.float32)
        everything = multiply(w, x)
        assert_close(w, x, everything)
        for tokens in TOKENS[:-1]:
            assert np.array_equal(multiply(w, x[:tokens]), everything[:tokens]), (rows, cols, tokens)


@pytest.mark.parametrize("name", CODECS)
def test_near_the_product_with_unrounded_activations(name, table, rng):
    w = make(name, 24, 512, rng)
    x = rng.standard_normal((4, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ w.weight_OI.T
    error = np.linalg.norm(multiply(w, x) - exact) / np.linalg.norm(exact)
    # Asymmetric codes need not be centred, so that much may cancel in the product.
    assert error < 0.05


@pytest.mark.parametrize("codes", ["zero", "full"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", CODECS)
def test_no_intermediate_overflows(name, table, rng, codes, sign):
    w = make(name, 20, 256, rng, codes)
    constant = np.full((2, 256), sign, np.float32)
    alternating = constant * np.where(np.arange(256) % 2, 1, -1).astype(np.float32)
    in_pairs = constant * np.where(np.arange(256) // 2 % 2, 1, -1).astype(np.float32)
    for x in (constant, alternating, in_pairs):
        assert_close(w, x, multiply(w, x))


@pytest.mark.parametrize("name", CODECS)
def test_outliers_zeros_and_tiny_activations(name, table, rng):
    w = make(name, 18, 200, rng)
    x = rng.standard_normal((6, 200)).astype(np.float32)
    x[0] = 0
    x[1, 77] = 1e30
    x[2] *= 1e-30
    x[3, 33:170] = 0
    x[4] = np.sign(x[4]) * np.float32(0.5)
    y = multiply(w, x)
    assert_close(w, x, y)
    assert not y[0].any()
    # Below what the scale can hold, activations count as zero.
    assert not multiply(w, np.full((1, 200), 1e-38, np.float32)).any()


@pytest.mark.parametrize("name", ["tile16:int4g32", "tile16:int3g64z", "tile16:int8g128", "tile16:mxfp4"])
def test_nan_is_not_lost(name, table, rng):
    w = make(name, 16, 256, rng)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    x[1, 200] = np.nan
    y = multiply(w, x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_scales_of_mxfp4_at_the_ends_of_their_range(table, rng):
    w = make("tile16:mxfp4", 16, 32, rng)
    raw = w.raw.copy()
    raw[:4] = (0, 1, 2, 255)
    scales = w.scales_OG.copy()
    scales[:3, 0] = np.ldexp(np.float32(1), np.array([-128, -127, -126]))
    changed = Tiled(w.kind, 16, 32, w.integers_OC, scales, raw)
    x = np.full((1, 32), 2.0**100, np.float32)
    x[:, 1:] *= rng.standard_normal(31).astype(np.float32)
    y = multiply(changed, x)
    wanted, magnitude = expected(changed, x)
    assert np.isnan(y[0, 3])
    assert (np.abs(y - wanted) <= 1e-6 * magnitude)[0, [0, 1, 2, *range(4, 16)]].all()


@pytest.mark.parametrize("name", CODECS)
def test_data_need_not_be_aligned(name, table, rng):
    w = make(name, 33, 160, rng)
    x = rng.standard_normal((3, 160)).astype(np.float32)
    aligned = multiply(w, x)
    for shift in (1, 2, 31):
        assert np.array_equal(multiply(w, x, shift), aligned)


@pytest.mark.parametrize("name", ["tile16:int4g32", "tile16:int8g64z", "tile16:mxfp4"])
def test_results_do_not_depend_on_the_threads(name, table, rng):
    w = make(name, 150, 96, rng)
    x = rng.standard_normal((5, 96)).astype(np.float32)
    core.set_threads(1)
    alone = multiply(w, x)
    for count in (2, 3, 16):
        core.set_threads(count)
        assert np.array_equal(multiply(w, x), alone)


def test_every_table_rounds_activations_alike(rng):
    # An identity in 8 bits shows the rounded activations; sums of a single term are exact.
    group = 32
    w = make("tile16:int8g32", 32, 32, rng)
    codes = np.full((32, 32), 128) + np.eye(32, dtype=int)

    raw = pack(w.kind, codes, np.ones((32, 1), np.float16), None)
    identity = Tiled(w.kind, 32, 32, codes - 128, np.ones((32, 1), np.float32), raw)
    x = rng.standard_normal((64, 32)).astype(np.float32)
    # Halves between integers, where rounding to even shows.
    x[:8] = np.arange(-16, 16) + 0.5
    x[:8, 0] = 127
    q, scale = quantize(x, group)
    before = core.kernels_name()
    for name in core.usable_kernels():
        core.use_kernels(name)
        assert np.array_equal(multiply(identity, x), q.astype(np.float32) * scale), name
    core.use_kernels(before)


@pytest.mark.parametrize("name", CODECS)
def test_agrees_with_the_codec(name, table, rng, seed):
    w = make(name, 21, 192, rng)
    codec = get_codec(name)
    assert codec.nbytes((21, 192)) == len(w.raw)
    decoded = codec.decode(torch.from_numpy(w.raw.copy()), (21, 192), torch.float32)
    assert np.allclose(decoded.numpy(), w.weight_OI, rtol=1e-6, atol=0)
    encoded = codec.encode(torch.randn(21, 192))
    stored = codec.decode(encoded, (21, 192), torch.float32).numpy()
    x = rng.standard_normal((3, 192)).astype(np.float32)
    q, scale = quantize(x, w.kind.group)
    wanted = (q * np.repeat(scale, w.kind.group, axis=1))[:, :192].astype(np.float64) @ stored.T
    got = multiply(Tiled(w.kind, 21, 192, w.integers_OC, w.scales_OG, encoded.numpy()), x)
    assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="int5g32"):
        core.Matrix(0, 4, 4, "tile16:int5g32")
    for rows, cols, codec in ((0, 4, "tile16:int4g32"), (4, 0, "tile16:int4g32"), (4, 48, "ggml:Q8_0")):
        with pytest.raises(ValueError, match="cannot have"):
            core.Matrix(0, rows, cols, codec)
    with pytest.raises(RuntimeError, match="choose one of: scalar"):
        core.use_kernels("sse9")
    with pytest.raises(ValueError, match="at least 1"):
        core.set_threads(0)
    assert set(CODECS) <= set(core.native_formats())


def test_calls_from_several_threads(rng):
    core.set_threads(3)
    w = make("tile16:int4g32", 64, 64, rng)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    wanted = multiply(w, x)
    wrong = []

    def work() -> None:
        wrong.extend(1 for _ in range(50) if not np.array_equal(multiply(w, x), wanted))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes():
    program = """
import os, sys
import numpy as np
from gangline.kernels.cpu import native
core = native()
core.set_threads(2)
w, x, y = np.ones((32, 32), np.float32), np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32)
matrix = core.Matrix(w.ctypes.data, 32, 32, "fp32")
core._matmul(matrix, x.ctypes.data, 1, y.ctypes.data)
child = os.fork()
y[:] = 0
core._matmul(matrix, x.ctypes.data, 1, y.ctypes.data)
good = bool((y == 32).all()) and core.threads() == 2
if child == 0:
    os._exit(0 if good else 1)
sys.exit(0 if good and os.waitpid(child, 0)[1] == 0 else 1)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_the_environment_names_the_table():
    program = "from gangline.kernels.cpu import native; print(native().kernels_name())"
    for name in core.usable_kernels():
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "GANGLINE_CPU": name},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.strip() == name
