"""The native checksum is zlib's."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.kernels.cpu import native
from gangline.kernels.cpu.checksum import crc32

core = native()


@given(st.integers(0, 700), st.integers(0, 17), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_every_length_and_alignment(length: int, skipped: int, seed: int, before: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, length + skipped, dtype=np.uint8)[skipped:]
    expected = zlib.crc32(data, before)
    assert crc32(data, before) == expected
    if core is not None:
        assert core.crc32(data, before, by_tables=True) == expected


def test_known_value() -> None:
    assert crc32(b"123456789") == 0xCBF43926
    assert crc32(b"") == 0


def test_pieces_give_what_the_whole_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, 100_003, dtype=np.uint8)
    crc = 0
    for piece in np.split(data, np.sort(rng.integers(0, len(data), 6))):
        crc = crc32(memoryview(piece), crc)
    assert crc == zlib.crc32(data)


@pytest.mark.skipif(core is None, reason="the native CPU core is not built here")
def test_arrays_with_gaps_count_what_they_show(seed: int) -> None:
    assert core is not None
    data = np.random.default_rng(seed).integers(0, 256, 400, dtype=np.uint8)
    assert core.crc32(data[::2]) == zlib.crc32(data[::2].tobytes())
