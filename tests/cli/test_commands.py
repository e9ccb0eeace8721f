"""``plan``, ``check``, ``bench`` and ``convert`` end to end on tiny random models."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from evaluation.tiny_text import saved_model, tiny_tokenizer
from gangline.evaluation import check as check_module
from gangline.evaluation import compare_speed, compare_speed_llamacpp, speed
from gangline.evaluation.bound import Bandwidths, Weights
from gangline.evaluation.generation import Generation
from gangline.evaluation.speed_report import PeerSpeed, Spread
from gangline.evaluation.speed_run import Sample
from gangline.evaluation.speed_side import Facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=7)


@pytest.fixture(autouse=True)
def instant_bandwidths(monkeypatch):
    monkeypatch.setattr(
        speed, "bandwidths", lambda *_, disk: Bandwidths(2e10, 1e9 if disk else None, "a way")
    )


SHORT = ["--share", "0.5", "--batch", "1", "--orders", "1", "--prompt-tokens", "5", "--new-tokens", "3"]


def test_plan_names_every_part(gangline, folder):
    result = gangline("plan", folder, "--memory", "4GiB")
    assert result.exit_code == 0, result.stderr
    for part in ("dense weights", "key/value cache", "expert slots", "peak", "fits in 4.00 GiB"):
        assert part in result.stdout


def test_plan_in_json(gangline, folder):
    found = json.loads(gangline("plan", folder, "--memory", "4GiB", "--precision", "int4", "--json").stdout)
    assert found["budget"] == 4 * 2**30
    assert found["precision"] == "int4"
    assert found["peak"] <= found["budget"]
    exact = json.loads(gangline("plan", folder, "--json").stdout)
    assert found["expert_bytes"] < exact["expert_bytes"]


def test_plan_refuses_with_the_smallest_budget(gangline, only_error, folder):
    result = gangline("plan", folder, "--memory", "20MiB")
    assert result.exit_code == 1
    assert "the smallest budget that works is" in only_error(result)


def test_check_passes(gangline, folder):
    result = gangline("check", folder, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("passed")


def test_check_in_json(gangline, folder):
    result = gangline("check", folder, *SHORT, "--json")
    found = json.loads(result.stdout)
    assert found["identical"] is True
    assert [case["budget"] for case in found["cases"]] == ["50 %", "smallest"]
    assert "experts in memory" in result.stderr


def test_check_that_does_not_pass_has_its_own_exit_code(gangline, folder, monkeypatch):
    real = check_module.generate_greedy

    def spoiled(model, ids, new_tokens):
        found = real(model, ids, new_tokens)
        return Generation(found.tokens_BN, found.logits_BNV + 1e-3)

    monkeypatch.setattr(check_module, "generate_greedy", spoiled)
    result = gangline("check", folder, *SHORT, "--no-reference")
    assert result.exit_code == 3
    assert result.stdout.splitlines()[-1].startswith("NOT PASSED")
    result = gangline("check", folder, *SHORT, "--no-reference", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["identical"] is False


def test_bench_in_json(gangline, folder):
    arguments = ["--prompt-tokens", "8", "--new-tokens", "3", "-r", "2", "--memory", "4GiB", "--json"]
    result = gangline("bench", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["memory"] == 4 * 2**30
    assert found["decode"]["n"] == 2
    assert found["kind"] == "measured"
    assert set(found["hit_rate"]) == {"host", "disk"}
    assert {"peak_resident_bytes", "miss_bytes_per_token", "bound", "prefill"} <= set(found)


def test_bench_of_a_shape(gangline):
    result = gangline(
        "bench", "--shape", "tiny-olmoe", "--prompt-tokens", "8", "--new-tokens", "3", "-r", "1"
    )
    assert result.exit_code == 0, result.stderr
    for part in ("decode", "prefill", "peak resident", "found in host", "read per token"):
        assert part in result.stdout
    assert "shapes/tiny-olmoe" in gangline("cache", "ls").stdout


def test_bench_records_a_trace_and_replays_it(gangline, only_error, folder, tmp_path):
    short = ["--prompt-tokens", "8", "--new-tokens", "3", "-r", "1"]
    trace = tmp_path / "routing"
    result = gangline("bench", folder, *short, "--record", trace)
    assert result.exit_code == 0, result.stderr
    result = gangline("bench", folder, *short, "--replay", trace, "--json", "--batch", "2")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["routing"], found["batch"]) == (f"replayed routing from {trace}", 2)
    assert f"replayed routing from {trace}" in gangline("bench", folder, *short, "--replay", trace).stdout
    assert "give one of them" in only_error(
        gangline("bench", folder, "--replay", trace, "--record", tmp_path / "x")
    )
    assert "exists already" in only_error(gangline("bench", folder, "--record", trace))
    assert "is not a trace" in only_error(gangline("bench", folder, "--replay", folder / "config.json"))
    other = gangline("bench", "--shape", "tiny-olmoe:2", *short, "--replay", trace)
    assert other.exit_code == 2
    assert "use a trace of this model" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "ollama"], "choose from llama.cpp, transformers"),
        (["--compare", "transformers", "--record", "x"], "leave --compare out"),
        (["--compare", "llama.cpp"], "pip install llama-cpp-python"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_bench_refuses(gangline, only_error, folder, monkeypatch, arguments, said):
    monkeypatch.setattr(compare_speed_llamacpp, "find_spec", lambda name: None)
    result = gangline("bench", folder, *arguments)
    assert result.exit_code == 2
    assert said in only_error(result)


def test_bench_shows_other_engines(gangline, folder, monkeypatch):
    def spread(median):
        return Spread(median, median / 2, median * 2, 3)

    def compared(model, engines, settings, **rest):
        assert (engines, settings.batch) == (["transformers"], 3)
        ours = speed.make_report(
            Facts("a banner", 9, 1, Weights(9, 9, 1.0, ((9, 18),), (), 1), 5),
            settings,
            [Sample(1.0, 1.0)],
            [(Bandwidths(9.0, 9.0, "a way"), Bandwidths(9.0))],
            model="m",
            text="text",
            routing="own",
            memory=None,
        )
        peer = PeerSpeed("transformers", "5", "bf16", spread(4.0), spread(8.0), spread(2.5), spread(1.5))
        return dataclasses.replace(ours, peers=(peer,), together=False)

    monkeypatch.setattr(compare_speed, "compare_speed", compared)
    arguments = ["bench", folder, "--compare", "transformers", "--batch", "3"]
    shown = gangline(*arguments).stdout
    for part in ("loaded in turns", "transformers 5, bf16", "8.00 tokens/s", "1.50x (0.75 to 3.00)", "2.50x"):
        assert part in shown
    found = json.loads(gangline(*arguments, "--json").stdout)
    assert found["peers"][0]["decode_ratio"] == {"median": 1.5, "low": 0.75, "high": 3.0, "n": 3}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("many words about boats, and a few about bread; " * 40)
    return file


def test_convert_makes_a_moe(gangline, dense, text, tmp_path):
    target = tmp_path / "moe"
    sizes = ["--experts", "4", "--top-k", "2", "--width", "16"]
    result = gangline("convert", dense, target, "--text", text, *sizes, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["output"] == str(target)
    config = AutoModelForCausalLM.from_pretrained(target).config
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (4, 2, 16)
    assert gangline("run", target, "boats", "-n", "2").exit_code == 0


@pytest.mark.parametrize("flag", [[], ["-o"]])
def test_convert_makes_a_gguf_file(gangline, folder, tmp_path, flag):
    target = tmp_path / "model.gguf"
    result = gangline("convert", folder, *flag, target, "--to", "gguf", "--type", "f32")
    assert result.exit_code == 0, result.stderr
    result = gangline("check", target, *SHORT, "--dtype", "fp32", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["reference_passed"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--text FILE"),
        (["--text", "/no/such/file"], "/no/such/file"),
        (["--text", "TEXT", "--type", "q8_0"], "--type"),
        (["--to", "gguf", "--experts", "4"], "--experts"),
        (["--to", "gguf", "--text", "TEXT"], "--text"),
        (["--text", "TEXT", "--experts", "3", "--top-k", "2"], "top_k"),
        (["--text", "TEXT", "--width", "0"], "--width"),
    ],
)
def test_convert_refuses(gangline, only_error, dense, text, tmp_path, arguments, said):
    words = [str(text) if word == "TEXT" else word for word in arguments]
    result = gangline("convert", dense, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert said in only_error(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("places", [[], ["a", "-o", "b"]])
def test_convert_writes_to_one_place(gangline, only_error, folder, places):
    assert "say where to write, once" in only_error(gangline("convert", folder, *places, "--to", "gguf"))


def test_convert_never_overwrites(gangline, only_error, folder, tmp_path):
    (tmp_path / "kept").write_text("kept")
    result = gangline("convert", folder, tmp_path / "kept", "--to", "gguf")
    assert result.exit_code == 2
    assert "exists already" in only_error(result)
    assert (tmp_path / "kept").read_text() == "kept"
