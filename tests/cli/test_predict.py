"""``gangline predict``: train, save, judge and execute on a tiny model; refuse what does not fit."""

import json

import pytest
import torch
from safetensors import safe_open

from evaluation.tiny_text import saved_model
from gangline.policies.predictors.saved import load_predictor

TEXT = "the quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def folder(tmp_path, seed):
    return saved_model(tmp_path / "model", "mixtral", seed % 1000)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def trained(gangline, folder, text, tmp_path):
    """Train a predictor of a kind; returns its file and what the command said."""

    def train(kind="sida", name="p.safetensors", *more):
        path = tmp_path / name
        sizes = ("--epochs", 2) if kind in ("token-id", "pre-gate") else ("--hidden", 16, "--epochs", 2)
        result = gangline(
            "predict", "train", folder, "--data", text, "-o", path, "--predictor", kind,
            "--window", 32, "--tokens", 500, *sizes, *more, "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        return path, json.loads(result.stdout)

    return train


@pytest.mark.parametrize("kind", ["sida", "expertflow", "read-me", "pre-gate", "token-id"])
def test_every_kind_is_trained_saved_and_judged(gangline, folder, text, trained, kind):
    path, said = trained(kind)
    saved = load_predictor(path)
    assert saved.kind == kind
    assert said["about"]["learnt_tokens"] < 500
    names = [hits["name"] for hits in said["hits"]]
    assert names == [kind, "frequency", "token-id", "previous token"] if kind != "token-id" else names
    for hits in said["hits"]:
        for layer in hits["layers"]:
            assert 0 <= layer["top1"] <= layer["topk"] <= 1 and 0 <= layer["recall"] <= 1
    again = gangline("predict", "eval", folder, "--predictor", path, "--data", text, "--window", 32, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["hits"][0]["name"] == kind


def test_the_same_seed_gives_the_same_file(trained):
    first, _ = trained("sida", "a.safetensors", "--seed", 3)
    second, _ = trained("sida", "b.safetensors", "--seed", 3)
    other, _ = trained("sida", "c.safetensors", "--seed", 4)
    tensors = []
    for path in (first, second, other):
        with safe_open(path, "pt") as file:
            tensors.append({name: file.get_tensor(name) for name in sorted(file.keys())})
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert any(not torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0])


def test_execution_says_what_it_costs(gangline, folder, text, trained):
    path, _ = trained()
    result = gangline(
        "predict", "eval", folder, "--predictor", path, "--data", text, "--window", 32, "--tokens", 200,
        "--mode", "execute",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "approximate: hash tables instead of the routers in 3 layers (3 routers skipped)" in result.stdout
    assert "perplexity" in result.stdout and "exact" in result.stdout


def test_run_and_bench_execute_and_say_so(gangline, folder, trained, only_error):
    path, _ = trained()
    sida = ("--policy", "sida", "--predictor", path, "--mode", "execute")
    made = gangline("run", folder, "the cat", "--raw", "--max-new-tokens", 4, *sida, "--json")
    assert made.exit_code == 0, made.stderr
    said = json.loads(made.stdout)
    assert "approximate (SiDA's hash tables" in said["banner"] and "held-out text" in said["banner"]
    assert said["stats"]["approximate"] and "approximate: SiDA" in made.stderr
    hinted = gangline("run", folder, "the cat", "--raw", "--max-new-tokens", 4, *sida[:-2], "--json")
    assert json.loads(hinted.stdout)["stats"]["approximate"] is None and "approximate" not in hinted.stderr
    timed = gangline("bench", folder, "--prompt-tokens", 5, "--new-tokens", 3, "-r", 1, *sida)
    assert timed.exit_code == 0, timed.stderr
    assert "approximate (SiDA's hash tables" in timed.stdout
    refused = gangline("run", folder, "the cat", "--mode", "execute")
    assert "--policy sida and --predictor FILE" in only_error(refused)
    other, _ = trained("token-id", "t.safetensors")
    wrong = gangline("run", folder, "x", "--policy", "sida", "--predictor", other, "--mode", "execute")
    assert "only one of kind sida" in only_error(wrong)


def test_a_trace_serves_as_well(gangline, folder, text, tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "p.safetensors"
    assert gangline("trace", folder, "--data", text, "-o", trace, "--logits", "--window", 32).exit_code == 0
    result = gangline("predict", "train", folder, "--trace", trace, "-o", path, "--hidden", 16, "--epochs", 1)
    assert result.exit_code == 0, result.stderr
    assert "learnt from" in result.stdout
    plain = tmp_path / "plain"
    assert gangline("trace", folder, "--data", text, "-o", plain, "--window", 32).exit_code == 0
    refused = gangline("predict", "train", folder, "--trace", plain, "-o", path)
    assert refused.exit_code == 2
    assert "--logits" in refused.stderr


def test_thresholds_become_a_policy(gangline, folder, text, tmp_path, only_error):
    trace, path = tmp_path / "trace", tmp_path / "fitted.yaml"
    assert gangline("trace", folder, "--data", text, "-o", trace, "--window", 32).exit_code == 0
    result = gangline("predict", "thresholds", trace, "-o", path, "--high", 0.8, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert 0.79 <= said["reached"][0] <= 1 and 0.5 <= said["high"] <= said["low"]
    shown = gangline("predict", "thresholds", trace, "-o", path, "--high", 0.8)
    assert "--mode mixed" in " ".join(shown.stdout.split())
    checked = gangline(
        "check", folder, "--policy", path, "--mode", "mixed", "--share", 0.3, "--batch", 1, "--new-tokens", 4
    )
    assert checked.exit_code == 0, checked.stderr
    assert "-o FILE.yaml" in only_error(gangline("predict", "thresholds", trace))
    sums = gangline("predict", "thresholds", trace, "-o", path, "--high", 0.9, "--skip", 0.5)
    assert "no more than 1 together" in only_error(sums)


def test_refusals(gangline, folder, text, tmp_path, trained, seed, only_error):
    path, _ = trained("token-id")
    other = saved_model(tmp_path / "other", "mixtral", seed % 1000 + 1)
    wrong = gangline("predict", "eval", other, "--predictor", path, "--data", text)
    assert wrong.exit_code == 2 and "routers of this model are others" in wrong.stderr
    executed = gangline("predict", "eval", folder, "--predictor", path, "--data", text, "--mode", "execute")
    assert "--mode execute is for sida alone" in only_error(executed)
    assert "-o FILE" in only_error(gangline("predict", "train", folder, "--data", text))
    assert "--predictor FILE" in only_error(gangline("predict", "eval", folder, "--data", text))
    neither = gangline("predict", "eval", folder, "--predictor", path)
    assert "either --data FILE or --trace DIR" in neither.stderr
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    few = gangline("predict", "train", folder, "--data", short, "-o", path)
    assert few.exit_code == 2 and "too few to hold some out" in few.stderr
