import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gangline.formats.bitstream import pack, planes, row_bytes, unpack


def words(packed: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in packed.view(torch.int32).view(-1).tolist()]


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (4, range(-8, 0), ["76543210"]),
        (3, [*range(-4, 4)] * 4, ["88fac688", "c688fac6", "fac688fa"]),
        (2, [*range(-2, 2)] * 8, ["e4e4e4e4", "e4e4e4e4"]),
        (1, [0, -1] * 16, ["55555555"]),
    ],
)
def test_golden_words_of_compressed_tensors(bits: int, values: list[int], expected: list[str]) -> None:
    codes = torch.tensor([list(values)]) + 2 ** (bits - 1)
    assert words(pack(codes.to(torch.uint8), bits)) == expected


@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 140),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_writes_the_bit_stream_and_unpack_reads_it(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    for row, data in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(data) == stream.to_bytes(len(data), "little")
    assert torch.equal(unpack(packed, columns, bits), codes)


@given(
    bits=st.sampled_from([1, 2, 4]),
    run=st.sampled_from([8, 16, 32, 64]),
    runs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_planes_take_the_lowest_bits_of_each_run_first(bits: int, run: int, runs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (2, runs * run), dtype=torch.uint8, generator=generator)
    expected = [
        [
            (block[start + byte] >> shift) % 2**bits
            for start in range(0, runs * run, run)
            for shift in range(0, 8, bits)
            for byte in range(run)
        ]
        for block in data.tolist()
    ]
    assert planes(data, run, bits).tolist() == expected
