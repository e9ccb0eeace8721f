"""Where a setting comes from: command line over variable over file over default."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.cli.options import variable


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"

    def write(text):
        path.write_text(text)
        return path

    return write


def shown(result):
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["settings"]
    return {row["key"]: (row["value"], row["source"]) for row in rows}


def test_default(gangline):
    found = shown(gangline("run", "m", "p", "--json", "--show-config"))
    assert found["precision"] == ("stored", "default")
    assert found["memory"] == (None, "default")
    assert found["model"] == ("m", "command line")


def test_file_over_default(gangline, file):
    path = file("memory: 6GiB\nctx-size: 99\nio: direct\n")
    found = shown(gangline("run", "m", "p", "--json", "--show-config", "--config", path))
    assert found["memory"] == ("6GiB", f"file {path}")
    assert found["ctx-size"] == (99, f"file {path}")
    assert found["io"] == ("direct", f"file {path}")
    assert found["config"] == (str(path), "command line")


def test_variable_over_file(gangline, file):
    path = file("memory: 6GiB\nctx-size: 99\n")
    result = gangline(
        "run", "m", "p", "--json", "--show-config", "--config", path, env={"GANGLINE_MEMORY": "7GiB"}
    )
    found = shown(result)
    assert found["memory"] == ("7GiB", "variable GANGLINE_MEMORY")
    assert found["ctx-size"] == (99, f"file {path}")


def test_command_line_over_variable(gangline, file):
    path = file("memory: 6GiB\n")
    result = gangline(
        *("run", "m", "p", "--json", "--show-config", "--config", path, "--memory", "8GiB"),
        env={"GANGLINE_MEMORY": "7GiB"},
    )
    assert shown(result)["memory"] == ("8GiB", "command line")


def test_file_named_by_variable(gangline, file):
    path = file("seed: 5\n")
    result = gangline("run", "m", "p", "--json", "--show-config", env={"GANGLINE_CONFIG": str(path)})
    assert shown(result)["seed"] == (5, f"file {path}")


def test_file_gives_the_model_and_the_flags(gangline, file):
    path = file("model: from-file\njson: true\nstats: yes\n")
    found = shown(gangline("chat", "--show-config", "--config", path))
    assert found["model"] == ("from-file", f"file {path}")
    assert found["json"] == (True, f"file {path}")


def test_switch_from_variable(gangline):
    found = shown(
        gangline("run", "m", "p", "--show-config", env={"GANGLINE_JSON": "1", "GANGLINE_RAW": "true"})
    )
    assert found["raw"] == (True, "variable GANGLINE_RAW")


def test_keys_of_other_commands_are_allowed(gangline, file):
    path = file("repetitions: 3\nmemory: 1GiB\n")
    assert shown(gangline("plan", "m", "--json", "--show-config", "--config", path))["memory"][0] == "1GiB"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memry: 6GiB", "did you mean 'memory'"),
        ("ctx_size: 6", "did you mean 'ctx-size'"),
        ("- a\n- b", "not a list"),
        ("just words", "not a str"),
        ("a: [", "is not YAML"),
        ("3: 4", "no flag --3"),
        ("config: other.yaml", "no flag --config"),
    ],
)
def test_bad_file_is_wrong_usage(gangline, only_error, file, text, said):
    result = gangline("plan", "m", "--config", file(text))
    assert result.exit_code == 2
    assert said in only_error(result)


@pytest.mark.parametrize("text", ["ctx-size: many", "precision: int5", "seed: [1, 2]", "json: perhaps"])
def test_bad_value_in_file_is_wrong_usage(gangline, only_error, file, text):
    result = gangline("run", "m", "p", "--config", file(text))
    assert result.exit_code == 2
    only_error(result)


def test_missing_file_is_wrong_usage(gangline, only_error, tmp_path):
    result = gangline("plan", "m", "--config", tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert "absent.yaml" in only_error(result)


def test_empty_file_sets_nothing(gangline, file):
    assert shown(gangline("plan", "m", "--json", "--show-config", "--config", file("")))["memory"] == (
        None,
        "default",
    )


def test_show_config_as_a_table(gangline):
    result = gangline("plan", "m", "--memory", "6GiB", "--show-config")
    assert result.exit_code == 0
    (line,) = [line for line in result.stdout.splitlines() if line.strip().startswith("memory")]
    assert line.split() == ["memory", "6GiB", "command", "line"]


@given(st.from_regex(r"[a-z]{1,8}(-[a-z]{1,8}){0,2}", fullmatch=True))
def test_variable_names(flag):
    name = variable(f"--{flag}")
    assert name.removeprefix("GANGLINE_").replace("_", "-").lower() == flag
