"""Memory in huge pages behaves as any other."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from gangline.kernels.cpu import huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("rows", [0, 1, 1000, 3000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_tensors_keep_what_is_written(rows: int, dtype: torch.dtype) -> None:
    made = huge_pages.empty((rows, 1024), dtype)
    assert made.shape == (rows, 1024) and made.dtype == dtype and made.is_contiguous()
    values = torch.randint(0, 200, (rows, 1024)).to(dtype)
    made.copy_(values)
    part = made[rows // 2 :]
    del made
    gc.collect()
    assert torch.equal(part, values[rows // 2 :])  # a view keeps the memory


def test_recycled_memory_goes_to_the_next_tensor_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[mmap.mmap] = []
    monkeypatch.setattr(huge_pages, "_kept", kept)
    size = 3 * huge_pages.HUGE_PAGE
    first = huge_pages.empty((size - 7,), torch.uint8, recycled=True)
    place, part = first.data_ptr(), first[9:]
    del first
    gc.collect()
    assert kept == []  # a view still looks at it
    del part
    gc.collect()
    other = huge_pages.empty((2 * size,), torch.uint8, recycled=True)
    own = huge_pages.empty((size,), torch.uint8)
    again = huge_pages.empty((size // 2,), torch.bfloat16, recycled=True)
    assert len(kept) == 0 and place == again.data_ptr() not in (other.data_ptr(), own.data_ptr())
    monkeypatch.setattr(huge_pages, "KEPT", size)
    del own, other, again
    gc.collect()
    assert [len(one) for one in kept] == [size]  # what is too much has gone, and the plain one at once


def test_mappings_are_zero_and_writable() -> None:
    mapped = huge_pages.map_anonymous(3 * huge_pages.HUGE_PAGE)
    assert len(mapped) >= 3 * huge_pages.HUGE_PAGE
    assert mapped[:1] == mapped[-1:] == b"\0"
    mapped[5:8] = b"abc"
    assert mapped[4:9] == b"\0abc\0"


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages to ask for")
@pytest.mark.skipif(not THP.is_file() or "[never]" in THP.read_text(), reason="huge pages are switched off")
def test_the_kernel_is_asked_for_huge_pages() -> None:
    weights = huge_pages.empty((8 * huge_pages.HUGE_PAGE + 5,), torch.uint8)
    weights.fill_(1)
    assert "hg" in flags_of(weights.data_ptr() + huge_pages.HUGE_PAGE)


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return rest
    return []
