"""The largest size that works, found by few tries."""

from hypothesis import given
from hypothesis import strategies as st

from gangline.benchmarks.largest import largest


@given(st.integers(0, 600), st.integers(1, 512), st.integers(1, 32))
def test_close_below_what_works(limit: int, most: int, parts: int) -> None:
    tried: list[int] = []

    def works(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest(works, most, parts=parts)
    true = min(limit, most)
    assert found <= true <= found + max(1, found // parts)
    assert all(1 <= size <= most for size in tried)
    assert len(tried) == len(set(tried)) <= 22
