"""``run`` and ``chat`` on tiny random models: the plain model's own words, streams, bad input."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.tiny_text import saved_model, tiny_tokenizer
from gangline.evaluation import plain as plain_models
from gangline.runtime import load
from gangline.runtime.head_start import HeadStart

FAMILY = "olmoe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), FAMILY, seed=3)


@pytest.fixture(scope="module")
def plain(folder):
    """Greedy continuation by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()

    def answer(text, new_tokens):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def test_raw_prompt_is_continued_as_the_plain_model_does(gangline, folder, plain):
    result = gangline("run", folder, "the cat", "--raw", "-n", "12")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == plain("the cat", 12) + "\n"


def test_chat_template_is_applied(gangline, folder, plain):
    result = gangline("run", folder, "hi", "-n", "8")
    assert result.stdout == plain("u: hi\na: ", 8) + "\n"


def test_prompt_from_stdin(gangline, folder, plain):
    result = gangline("run", folder, "-", "--raw", "-n", "6", input="a dog")
    assert result.stdout == plain("a dog", 6) + "\n"


def test_json_is_all_that_reaches_stdout(gangline, folder, plain):
    result = gangline("run", folder, "the cat", "--raw", "-n", "12", "--json", "--stats")
    found = json.loads(result.stdout)
    assert found["text"] == plain("the cat", 12)
    assert found["prompt_tokens"] == 7
    assert found["new_tokens"] <= 12
    assert found["stats"]["prefill_tokens"] == 7
    assert found["banner"] in result.stderr


def test_stats_banner_on_stderr(gangline, folder):
    result = gangline("run", folder, "the cat", "-n", "6", "--stats", "--memory", "4GiB")
    (line,) = [line for line in result.stderr.splitlines() if "|" in line]
    parts = line.split(" | ")
    assert parts[0] == "exact, fp32, 100% of experts in RAM"
    assert parts[1].startswith("decode ")
    assert any("of 4.00 GiB" in part for part in parts)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_approximate_precision_says_so(gangline, folder, precision):
    result = gangline("run", folder, "the cat", "-n", "2", "--stats", "--precision", precision)
    assert result.exit_code == 0, result.stderr
    assert "approximate" in result.stderr


def test_sampling_repeats_with_the_seed(gangline, folder):
    def say(*more):
        result = gangline("run", folder, "the cat", "-n", "20", "--temperature", "5", *more)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert say("--seed", "1") == say("--seed", "1")
    assert len({say("--seed", str(seed)) for seed in range(4)}) > 1


def test_top_k_of_one_is_greedy(gangline, folder, plain):
    result = gangline("run", folder, "the cat", "--raw", "-n", "9", "--top-k", "1")
    assert result.stdout == plain("the cat", 9) + "\n"


def test_prompt_longer_than_the_context(gangline, only_error, folder):
    result = gangline("run", folder, "x" * 100, "--raw")
    assert result.exit_code == 1
    assert "100 tokens and the context 64" in only_error(result)
    result = gangline("run", folder, "hello", "--raw", "-c", "5")
    assert result.exit_code == 1
    assert "5 tokens and the context 5" in only_error(result)


def test_answer_is_cut_at_the_context(gangline, folder):
    result = gangline("run", folder, "hello", "--raw", "-c", "9", "-n", "50", "--json")
    assert json.loads(result.stdout)["new_tokens"] <= 4


@pytest.mark.parametrize("memory", [("--memory", "4GiB"), ()])
def test_a_budget_counts_the_tokenizer(gangline, folder, monkeypatch, memory):
    """It is in memory when the plan is made; without a budget it is read later, beside the experts."""
    order = []

    def noting(what, function):
        def noted(*arguments, **more):
            order.append(what)
            return function(*arguments, **more)

        return noted

    monkeypatch.setattr(plain_models, "load_tokenizer", noting("tokenizer", plain_models.load_tokenizer))
    monkeypatch.setattr(load, "plan_request", noting("plan", load.plan_request))
    assert gangline("run", folder, "the cat", "-n", "2", *memory).exit_code == 0
    assert order == (["tokenizer", "plan"] if memory else ["plan", "tokenizer"])


def test_budget_too_small_names_the_smallest(gangline, only_error, folder):
    result = gangline("run", folder, "hello", "--memory", "10MiB")
    assert result.exit_code == 1
    assert "smallest budget that works" in only_error(result)


def test_model_without_a_tokenizer(gangline, only_error, tmp_path):
    folder = saved_model(tmp_path, FAMILY, seed=0, text=False)
    result = gangline("run", folder, "hello")
    assert result.exit_code == 1
    assert "no tokenizer" in only_error(result)


def test_chat_without_a_template(gangline, only_error, tmp_path):
    folder = saved_model(tmp_path, FAMILY, seed=0, chat=False)
    result = gangline("chat", folder, input="hi\n")
    assert result.exit_code == 2
    assert "no chat template" in only_error(result)


def test_chat_remembers_and_forgets(gangline, folder, plain):
    result = gangline("chat", folder, "-n", "6", input="hi\nyo\n/reset\nhi\n/exit\nignored\n")
    assert result.exit_code == 0, result.stderr
    first = plain("u: hi\na: ", 6)
    second = plain(f"u: hi\na: {first}\nu: yo\na: ", 6)
    assert result.stdout == f"{first}\n{second}\n{first}\n"


def test_chat_commands_speak_on_stderr(gangline, folder):
    result = gangline("chat", folder, input="/stats\n/what\n\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    banner, help_line = result.stderr.splitlines()
    assert banner.startswith("exact, ")
    assert "/exit leaves" in help_line


def test_chat_goes_on_when_the_context_is_full(gangline, folder, plain):
    result = gangline("chat", folder, "-n", "4", input="x" * 80 + "\nhi\n")
    assert result.exit_code == 0, result.stderr
    assert "/reset begins again" in result.stderr
    assert result.stdout == plain("u: hi\na: ", 4) + "\n"


def test_chat_in_json_is_one_document_per_turn(gangline, folder):
    result = gangline("chat", folder, "--json", "-n", "3", input="hi\n")
    assert json.loads(result.stdout)["user"] == "hi"


def test_the_second_command_begins_to_read_early_and_answers_the_same(
    gangline, folder, plain, monkeypatch, tmp_path
):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path))
    claimed = []
    real = HeadStart.claim
    monkeypatch.setattr(
        HeadStart, "claim", lambda self, *args: claimed.append(real(self, *args)) or claimed[-1]
    )
    for _ in range(2):
        result = gangline("run", folder, "the cat", "--raw", "-n", "6", "--precision", "int8")
        assert result.exit_code == 0, result.stderr
    first, second = claimed
    assert first is None
    assert second is not None
    told = [gangline("run", folder, "the cat", "--raw", "-n", "6").stdout for _ in range(2)]
    assert told == [plain("the cat", 6) + "\n"] * 2


@pytest.mark.parametrize("option", [("--memory", "4GiB"), ("--dtype", "fp32"), ("--io", "cached")])
def test_another_question_claims_nothing(gangline, folder, monkeypatch, option):
    gangline("run", folder, "the cat", "--raw", "-n", "2")
    claimed = []
    real = HeadStart.claim
    monkeypatch.setattr(
        HeadStart, "claim", lambda self, *args: claimed.append(real(self, *args)) or claimed[-1]
    )
    result = gangline("run", folder, "the cat", "--raw", "-n", "2", *option)
    assert result.exit_code == 0, result.stderr
    assert claimed in ([], [None])
