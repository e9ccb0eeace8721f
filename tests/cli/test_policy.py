"""``--policy``, ``simulate --systems`` and ``tune`` end to end on a tiny random model."""

import json

import pytest

from evaluation.tiny_text import saved_model
from gangline.policies.compositions import COMPOSITIONS


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=7)


def test_run_names_the_policy(gangline, folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("like: hobbit-exact\ncache: {name: lfru, window: 16}\nahead: 2\n")
    answers = []
    for policy in ("default", "hybrimoe", tmp_path / "mine.yaml"):
        result = gangline("run", folder, "the cat", "-n", "5", "--policy", policy, "--json")
        assert result.exit_code == 0, result.stderr
        data = json.loads(result.stdout)
        assert f"policy {policy} (idle" in data["banner"]
        answers.append(data["text"])
    assert len(set(answers)) == 1


def test_check_passes_under_a_policy(gangline, folder):
    result = gangline(
        "check", folder, "--policy", "fate", "--share", "0.5", "--batch", "2", "--new-tokens", "4", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["passed"]


def test_two_precisions_must_be_allowed_and_say_what_they_are(gangline, only_error, folder, tmp_path):
    refused = gangline("run", folder, "x", "--policy", "hobbit")
    assert refused.exit_code == 2 and "--mode mixed" in only_error(refused)
    mixed = ("--policy", "hobbit", "--mode", "mixed")
    planned = gangline("plan", folder, *mixed, "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["low_slots"] == []  # all experts fit
    checked = gangline(
        "check", folder, *mixed, "--share", "0.3", "--batch", "1", "--new-tokens", "6", "--json"
    )
    assert checked.exit_code == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert report["passed"] and "tile16:int4" in report["approximate"]
    assert all(0 <= case["same_tokens"] <= 1 for case in report["cases"])
    shown = gangline("check", folder, *mixed, "--share", "0.3", "--batch", "1", "--new-tokens", "6")
    assert "approximate, not exact" in shown.stdout and "of the tokens the same" in shown.stdout


@pytest.mark.parametrize("command", [("run", "hello"), ("check",), ("bench",), ("chat",)])
def test_unknown_policy_is_one_line(gangline, only_error, folder, command):
    name, *rest = command
    result = gangline(name, folder, *rest, "--policy", "hybrimoo")
    assert result.exit_code == 2
    assert "did you mean 'hybrimoe'" in only_error(result)


def test_bad_compositions_are_one_line(gangline, only_error, folder, tmp_path):
    path = tmp_path / "p.yaml"
    for text, says in [
        ("cache: [1]", "cache must be a name"),
        ("cash: lru", "no key 'cash'"),
        ("- lru", "must hold lines"),
        ("cache: {window: 3}", "cache needs a name"),
        ("cache: {name: lru, window: 3}", "has no parameter 'window'"),
        ("cache: lruu", "no cache is called 'lruu'"),
        ("predictor: guess", "no predictor is called 'guess'"),
        ("prefetcher: guess", "no prefetcher is called 'guess'"),
        ("scope: model", "must be layer or global"),
        ("ahead: 0", "at least 1"),
        ("like: hobbit", "lower precision"),
        ("predictor: oracle", "knows the future"),
        ("cache: {a", "is not YAML"),
    ]:
        path.write_text(text)
        result = gangline("run", folder, "x", "--policy", path)
        assert result.exit_code == 2, text
        assert says in only_error(result), text


def test_simulate_systems(gangline, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\na dog sat\n")
    trace = ("trace", folder, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "t", "-n", "7")
    assert gangline(*trace).exit_code == 0
    simulate = ("simulate", tmp_path / "t", "--policies", "lru", "--capacity", "10", "--json")
    result = gangline(*simulate, "--systems", "all", "--calibrate", tmp_path / "t")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    shown = {row["policy"] for row in data["rows"]}
    noted = {note.split()[0] for note in data["notes"] if "left out" in note}
    exact = {name for name, found in COMPOSITIONS.items() if found.exact}
    assert exact <= shown | noted and {"moe-infinity", "freetoken", "fiddler"} <= shown
    assert {"sida", "fate"} <= noted
    refused = gangline(*simulate, "--systems", "fate")
    assert refused.exit_code == 2 and "gangline tune" in refused.stderr


def test_tune(gangline, folder):
    result = gangline("tune", folder, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["choice"] is None and data["stored"] is None  # all experts fit
    refused = gangline("tune", folder, "--policy", "fate")
    assert refused.exit_code == 2 and "leave --policy out" in refused.stderr
