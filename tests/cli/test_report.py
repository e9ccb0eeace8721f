"""``gangline report`` end to end on a tiny random model."""

import json
import sys

import pytest

from evaluation.tiny_text import saved_model

TEXT = "the cat sat on the mat and the dog sat on the cat " * 4


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Two traces of one model, and its folder."""
    from typer.testing import CliRunner

    from gangline.cli.main import app

    here = tmp_path_factory.mktemp("report")
    model = saved_model(here / "model", "qwen3_moe", seed=7)
    for name, text in (("cats", TEXT), ("dogs", TEXT[::-1])):
        (here / f"{name}.txt").write_text(text)
        arguments = ["trace", model, "--data", here / f"{name}.txt", "-o", here / name, "--window", "50"]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
    return here


def test_a_page_of_two_traces(gangline, traces, tmp_path):
    result = gangline(
        *("report", traces / "cats", traces / "dogs", "-o", tmp_path / "out", "--sim-tokens", "60"),
        *("--link", "1GB", "--compute-us", "5", "--layer-us", "10"),
    )
    assert result.exit_code == 0, result.stderr
    assert "index.html" in result.stdout and "Is it worth caching" in result.stdout
    found = json.loads((tmp_path / "out/report.json").read_text())
    caching = found["sections"]["caching"]["numbers"]
    assert caching["kind"] == "simulated" and len(caching["simulations"]) == 1
    rows = caching["simulations"][0]["rows"]
    bound = {row["slots"]: row["hit_rate"] for row in rows if row["policy"].startswith("belady")}
    assert len(bound) > 2 and all(row["hit_rate"] <= bound[row["slots"]] + 1e-9 for row in rows)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert found["groups"] == {"kind": "trace", "names": ["cats", "dogs"]}
    words = {
        t["text"] for layer in found["sections"]["tokens"]["numbers"]["top_tokens"] for e in layer for t in e
    }
    assert words & set("cat dog")
    assert (tmp_path / "out/hit_rate.png").is_file() and (tmp_path / "out/what_if.png").is_file()


def test_json_needs_no_matplotlib_and_writes_nothing(gangline, traces, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    result = gangline("report", traces / "cats", "--json", "--sim-tokens", "0")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["files"] == [] and not list(tmp_path.iterdir())
    assert found["sections"]["caching"]["says"] is None


def test_pictures_without_matplotlib_are_refused_at_once(gangline, only_error, traces, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = only_error(gangline("report", traces / "cats", "-o", tmp_path / "out"))
    assert "gangline[plot]" in error and not (tmp_path / "out").exists()


def test_outputs_are_measured_and_kept(gangline, traces, tmp_path):
    page = tmp_path / "page.html"
    result = gangline("report", traces / "cats", "-o", page, "--sim-tokens", "0", "--outputs")
    assert result.exit_code == 0, result.stderr
    assert (
        traces / "cats/expert_outputs.json"
    ).is_file() and "Largest output of every expert" in page.read_text()
    again = json.loads(gangline("report", traces / "cats", "--json", "--sim-tokens", "0").stdout)
    assert again["sections"]["super_experts"]["numbers"]["tokens"] > 0


def test_what_is_no_trace_is_refused(gangline, only_error, tmp_path):
    assert "not a trace" in only_error(gangline("report", tmp_path, "-o", tmp_path / "out"))
