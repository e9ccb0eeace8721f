"""How a prompt's experts are cut into calls whose outputs the memory plan has room for."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gangline.runtime.engine import runs_within


@given(st.lists(st.integers(1, 50)), st.integers(1, 100))
def test_runs_are_whole_and_within_the_limit(counts, pairs):
    runs = list(runs_within(counts, pairs))
    assert [index for first, last in runs for index in range(first, last)] == list(range(len(counts)))
    assert all(last - first == 1 or sum(counts[first:last]) <= pairs for first, last in runs)
    # No two neighbours would have fitted into one call.
    assert all(sum(counts[a:d]) > pairs for (a, _), (_, d) in pairwise(runs))


def test_one_run_where_everything_fits():
    assert list(runs_within([3, 4, 5], 12)) == [(0, 3)]
    assert list(runs_within([3, 9, 1], 4)) == [(0, 1), (1, 2), (2, 3)]
