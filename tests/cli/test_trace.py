"""``trace`` and ``simulate`` end to end on a tiny random model."""

import json

import pytest

from evaluation.tiny_text import saved_model
from gangline.traces import open_trace

TEXT = "the cat sat on the mat and the dog sat on the cat " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=7)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """A trace of the model's own answers."""
    from typer.testing import CliRunner

    from gangline.cli.main import app

    here = tmp_path_factory.mktemp("answers")
    (here / "prompts.txt").write_text("the cat\n\na dog sat\n")
    arguments = [
        "trace",
        folder,
        "--prompts",
        here / "prompts.txt",
        "-o",
        here / "trace",
        "-n",
        "9",
        "--logits",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return here / "trace"


def test_text_in_windows_with_labels(gangline, folder, text, tmp_path):
    arguments = [
        "trace",
        folder,
        "--data",
        text,
        "-o",
        tmp_path / "t",
        "--window",
        "40",
        "--label",
        "lang=en",
    ]
    result = gangline(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    trace = open_trace(tmp_path / "t")
    assert found["tokens"] == len(trace) and found["documents"] == 4
    assert [d.tokens for d in trace.documents] == [40, 40, 40, len(TEXT) - 3 * 39 + 1]
    assert trace.header.labels == {"lang": ("en",)}
    assert trace.header.source == "text" and trace.header.tokenizer_sha256
    assert trace.header.backend == "gangline"
    assert trace.tokens.is_special.sum() == 4
    assert trace.tokens.pred_id[:-1].max() >= -1


def test_resume_goes_on_where_it_stopped(gangline, only_error, folder, text, tmp_path):
    arguments = ["trace", folder, "--data", text, "-o", tmp_path / "t", "--window", "40"]
    assert gangline(*arguments, "--limit", "2").exit_code == 0
    assert "resume" in only_error(gangline(*arguments))
    assert gangline(*arguments, "--resume").exit_code == 0
    assert [d.number for d in open_trace(tmp_path / "t").documents] == [0, 1, 2, 3]
    again = gangline(*arguments, "--resume")
    assert again.exit_code == 0 and "holds all 4 documents already" in again.stderr


def test_own_answers(answers):
    trace = open_trace(answers)
    assert trace.header.source == "generation" and trace.header.sampling["max_new_tokens"] == 9
    assert {0, 1} == set(trace.tokens.phase.tolist())
    assert trace.header.extras == ("logits",)
    (event, *_) = trace.events({"scores"})
    assert event.detail.scores_TE.sum(axis=1) == pytest.approx(1.0, abs=1e-3)


def test_simulate_prints_policies_and_bounds(gangline, answers):
    arguments = ["simulate", answers, "--policies", "layer-lru,lru@global,lfru:privileged=0.3,mrs"]
    result = gangline(*arguments, "--capacity", "50%,rho=1", "--link", "1GB", "--compute-us", "100")
    assert result.exit_code == 0, result.stderr
    for word in ("layer-lru", "lru@global", "belady-bypass@global", "oracle(8)", "tokens/s", "of bound"):
        assert word in result.stdout


def test_simulate_in_json_keeps_the_bounds(gangline, answers):
    arguments = [
        "simulate",
        answers,
        "--policies",
        "lru,random",
        "--capacity",
        "5,12,100%",
        "--bypass",
        "--json",
    ]
    found = json.loads(gangline(*arguments).stdout)
    assert found["kind"] == "simulated"
    rows = {(row["policy"], row["slots"]): row for row in found["rows"]}
    assert {slots for _, slots in rows} == {5, 12, found["experts"]}
    for (policy, _), row in rows.items():
        if "oracle" not in policy:
            assert row["hit_rate"] <= row["belady"] + 1e-9 or row["phases"]["prefill"]["by_prefetch"]
    full = rows["lru", found["experts"]]
    # Beyond what prompts read ahead, a cache that holds everything is as good as can be.
    assert full["of_belady"] == pytest.approx(1.0)


def test_every_causal_cache_can_be_named(gangline, answers):
    from gangline.policies.caches import CACHES

    arguments = ["simulate", answers, "--policies", ",".join(CACHES), "--capacity", "rho=1.5"]
    result = gangline(*arguments, "--calibrate", answers, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert {row["policy"] for row in rows} >= set(CACHES)


def test_one_token_at_a_time(gangline, folder, text, tmp_path):
    gangline("trace", folder, "--data", text, "-o", tmp_path / "t", "--mode", "ids", "--limit", "1")
    arguments = ["simulate", tmp_path / "t", "--policies", "lru", "--capacity", "50%", "--json"]
    decoded = json.loads(gangline(*arguments).stdout)
    assert set(decoded["rows"][0]["phases"]) == {"decode"}
    assert json.loads(gangline(*arguments, "--tokens", "7").stdout)["tokens"] == 7
    passes = json.loads(gangline(*arguments, "--replay", "passes").stdout)
    assert set(passes["rows"][0]["phases"]) == {"prefill"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--capacity", "lots"], "capacity 'lots'"),
        (["--capacity", "0"], "less than one expert"),
        (["--policies", "best"], "no cache is called 'best'"),
        (["--policies", "lru@moon"], "scope 'moon'"),
        (["--policies", "lfru:privileged"], "KEY=VALUE"),
        (["--policies", "static-hot"], "give --calibrate TRACE"),
        (["--policies", ","], "at least one policy"),
        (["--link", "fast"], "cannot read the size"),
    ],
)
def test_simulate_refuses(gangline, only_error, answers, arguments, problem):
    result = gangline("simulate", answers, *arguments)
    assert result.exit_code == 2
    assert problem in only_error(result)


def test_trace_refuses(gangline, only_error, folder, text, tmp_path):
    for arguments, problem in (
        (["--data", text], "say where to write"),
        (["-o", tmp_path / "t"], "either --data"),
        (["-o", tmp_path / "t", "--data", text, "--label", "x"], "KIND=NAME"),
        (["-o", tmp_path / "t", "--data", tmp_path / "nothing"], "cannot be read as text"),
    ):
        result = gangline("trace", folder, *arguments)
        assert result.exit_code == 2
        assert problem in only_error(result)
    assert "is not a trace" in only_error(gangline("simulate", tmp_path / "t"))


def test_sums_only_cannot_be_replayed(gangline, only_error, folder, text, tmp_path):
    gangline("trace", folder, "--data", text, "-o", tmp_path / "t", "--mode", "counts")
    result = gangline("simulate", tmp_path / "t")
    assert result.exit_code == 1
    assert "sums only" in only_error(result)
