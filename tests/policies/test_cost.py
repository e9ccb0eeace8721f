"""The cost table: curves, links, and the refusal of another machine's numbers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.cost import CostTable, Curve, straight
from gangline.core.errors import UsageError


def test_curve_goes_through_its_points_and_beyond():
    curve = Curve(((1, 2.0), (4, 5.0), (8, 7.0)))
    assert [curve(n) for n in (0, 0.5, 1, 2, 4, 6, 8, 16)] == pytest.approx([0, 2, 2, 3, 5, 6, 7, 11])
    assert straight(0.8, 1.0)(10) == pytest.approx(10.8)
    assert Curve(((2, 3.0),))(4) == pytest.approx(6.0)


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=8), st.floats(0, 2000), st.floats(0, 2000))
def test_curve_of_rising_costs_never_falls(steps, a, b):
    points, n, t = [], 1, 0.0
    for step in steps:
        t += step
        points.append((n, t))
        n *= 2
    curve = Curve(tuple(points))
    assert curve(min(a, b)) <= curve(max(a, b)) + 1e-9


def test_table_survives_json_and_names_what_is_missing():
    table = CostTable(
        "box",
        100,
        straight(1, 2),
        straight(3, 0),
        0.5,
        0.25,
        {"host_to_hbm": 10.0},
        {"host_to_hbm": 5.0},
        40.0,
    )
    again = CostTable.from_json(json.loads(json.dumps(table.to_json())), "box")
    assert again == table
    assert (again.t_move(), again.t_move(concurrent=True)) == (10.0, 20.0)
    with pytest.raises(UsageError, match="measured on box, not on other"):
        CostTable.from_json(table.to_json(), "other")
    with pytest.raises(UsageError, match="no bandwidth of disk_to_host"):
        table.t_move("disk_to_host")
    assert CostTable("cpu only", 1, straight(1, 1)).t_gpu(3) == float("inf")
