import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.benchmarks import result
from gangline.benchmarks.result import (
    ResultError,
    Row,
    compare,
    machine_info,
    read_result,
    validate,
    write_result,
)

values = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=7)


def written(folder, *rows):
    return json.loads(write_result("x", rows, "python bench.py", folder=folder).read_text())


def test_written_results_are_read_back(tmp_path):
    row = Row(
        "olmoe, decode", "tokens/s", 4.0, "llama.cpp", 2.0, ratio=2.0, bound_share=0.5, n=5, spread=0.25
    )
    path = write_result("speed", [row], "python bench.py", folder=tmp_path / "new", machine={"disk": 1.5})
    found = read_result(path)
    assert found["rows"] == [row.__dict__]
    assert found["command"] == "python bench.py"
    assert found["machine"] == machine_info() | {"disk": 1.5}
    assert found["versions"]["gangline"]
    assert [p.name for p in path.parent.iterdir()] == ["speed.json"]


def test_a_bad_row_leaves_the_old_file(tmp_path):
    good = Row("w", "m", 1.0)
    path = write_result("x", [good], "c", folder=tmp_path)
    before = path.read_bytes()
    with pytest.raises(ResultError, match="row 1: ours"):
        write_result("x", [good, Row("w", "m", float("nan"))], "c", folder=tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ours": None}, "neither"),
        ({"ours": "4"}, "finite"),
        ({"ours": True}, "finite"),
        ({"peer": "llama.cpp"}, "together"),
        ({"n": 0}, "n must"),
        ({"kind": "guessed"}, "guessed"),
        ({"work": ""}, "work"),
        ({"extra": 1}, "exactly"),
    ],
)
def test_each_broken_field_is_named(tmp_path, change, says):
    found = written(tmp_path, Row("w", "m", 1.0))
    found["rows"][0] |= change
    with pytest.raises(ResultError, match=says):
        validate(found)


@pytest.mark.parametrize("key", ["name", "commit", "date", "command", "machine", "versions", "rows"])
def test_each_missing_key_is_refused(tmp_path, key):
    found = written(tmp_path, Row("w", "m", 1.0))
    with pytest.raises(ResultError):
        validate({k: v for k, v in found.items() if k != key})
    with pytest.raises(ResultError, match=key):
        validate(found | {key: [] if key == "rows" else ""})


def test_files_that_are_not_results(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ResultError, match="run its benchmark again"):
        read_result(path)


@given(values)
def test_pairs_give_the_median_of_ratios(ours):
    peers = [value / 2 for value in ours]
    row = compare("w", "tokens/s", ours, "p", peers)
    assert row.ratio == pytest.approx(2)
    assert row.n == len(ours)
    assert row.ours == statistics.median(ours)
    assert row.spread is None if len(ours) == 1 else row.spread == max(ours) - min(ours)
    slower = compare("w", "seconds", ours, "p", peers, higher_is_better=False)
    assert slower.ratio == pytest.approx(0.5)


def test_one_side_alone():
    assert compare("w", "m", [], "p", [3.0]).ratio is None
    assert compare("w", "m", [1.0, 3.0]).peer_value is None
    assert compare("w", "m", [2.0, 2.0, 8.0], "p", [1.0]).ratio == 2.0


def test_the_command_does_not_show_where_we_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(result.sys, "argv", [str(tmp_path / "benchmarks" / "a.py"), "--model", "a b"])
    assert result.running_command() == "python benchmarks/a.py --model 'a b'"
    hidden = result.running_command({"--model": "FOLDER"})
    assert hidden == "python benchmarks/a.py --model FOLDER"
    monkeypatch.setattr(result.sys, "argv", ["/usr/local/bin/gangline", "bench"])
    assert result.running_command() == "gangline bench"
