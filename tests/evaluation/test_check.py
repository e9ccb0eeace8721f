"""The check finds what it is there to find: placement that changes an answer."""

import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

import gangline
from evaluation.tiny_text import saved_model
from gangline.benchmarks.shapes import make_shape
from gangline.core.errors import UsageError
from gangline.evaluation import check as check_module
from gangline.evaluation import reference as reference_module
from gangline.evaluation.check import CheckSettings, check_model
from gangline.evaluation.generation import Generation
from gangline.evaluation.plain import find_checkpoint
from gangline.runtime.engine import Engine
from gangline.runtime.opened import open_model

FULL = CheckSettings(prompt_tokens=8, new_tokens=6, batch_sizes=(1, 2))
SHORT = CheckSettings(prompt_tokens=6, new_tokens=4, shares=(0.5,), batch_sizes=(2,), cache_seeds=(None,))
ALONE = replace(SHORT, reference=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=5)


def test_fp32_model_passes(folder):
    steps = []
    report = check_model(folder, FULL, progress=steps.append)
    assert report.passed
    assert report.identical
    assert report.reference_passed
    assert report.dtype == "float32"
    assert {case.budget for case in report.cases} == {"100 %", "50 %", "25 %", "smallest"}
    assert {case.cache for case in report.cases} == {"default", "random 1"}
    assert {case.batch for case in report.cases} == {1, 2}
    assert all(case.reference_tokens_equal for case in report.cases)
    assert all(0 <= case.reference_max_abs_logit_diff <= report.tolerance for case in report.cases)
    assert sum(case.misses for case in report.cases if case.budget == "smallest") > 0
    assert steps[:2] == ["all experts in memory", "plain transformers model"]


def test_the_plain_model_does_not_compute_through_ours(folder, monkeypatch):
    calls = []
    compute, speak = Engine.forward, reference_module.generate_greedy

    def counted(self, *arguments):
        calls.append(1)
        return compute(self, *arguments)

    def generate(model, ids, new_tokens):
        calls.clear()
        found = speak(model, ids, new_tokens)
        assert bool(calls) == hasattr(model, "gangline")
        return found

    monkeypatch.setattr(Engine, "forward", counted)
    monkeypatch.setattr(reference_module, "generate_greedy", generate)
    assert check_model(folder, SHORT).passed


def test_report_is_the_documented_json(folder):
    report = check_model(folder, SHORT)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["model"] == str(folder)
    assert found["identical"] is True
    wanted = {"budget", "identical", "reference_tokens_equal", "reference_max_abs_logit_diff"}
    assert all(wanted <= set(case) for case in found["cases"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_the_tolerance(folder, dtype):
    report = check_model(folder, SHORT, dtype=dtype)
    assert report.passed, report
    assert report.identical
    assert report.reference_passed


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_approximate_precision_is_compared_but_not_judged(folder, precision):
    report = check_model(folder, SHORT, precision=precision)
    assert report.identical
    assert report.passed
    assert report.reference_passed is None
    assert max(case.reference_max_abs_logit_diff for case in report.cases) > 1e-4


def test_without_reference(folder):
    report = check_model(folder, ALONE)
    assert report.passed
    assert report.reference == "not run: switched off"
    assert report.tolerance is None
    assert {case.reference_tokens_equal for case in report.cases} == {None}


def test_reference_that_does_not_fit_is_said(folder, monkeypatch):
    monkeypatch.setattr(reference_module, "no_room_for_plain", lambda *model: "needs 9 TiB of memory")
    report = check_model(folder, SHORT)
    assert report.reference == "not run: needs 9 TiB of memory"
    assert report.reference_passed is None


def test_experts_that_do_not_all_fit_are_compared_with_the_most_that_do(folder, monkeypatch):
    monkeypatch.setattr(check_module, "_baseline_slots", lambda opened, loading: 7)
    report = check_model(folder, FULL)
    assert report.passed
    assert report.baseline.startswith("7 of ")
    assert {case.budget for case in report.cases} == {"25 %", "smallest"}
    assert max(case.expert_slots for case in report.cases) <= 7


def test_what_fits_follows_from_free_memory(folder, monkeypatch):
    opened = open_model(find_checkpoint(folder), None)
    assert check_module._baseline_slots(opened, {}) is None
    plan = gangline.plan(folder)
    expert = plan.slot_bytes // plan.experts_total
    free = int((plan.fixed - plan.process + 5.5 * expert) / 0.9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert check_module._baseline_slots(opened, {}) == 5


def test_encoder_decoder_shape(tmp_path):
    folder = make_shape("tiny-switch", tmp_path / "switch", dtype=torch.float32)
    report = check_model(folder, SHORT)
    assert report.identical, report
    assert report.reference_passed, report


class Spoiler:
    """Changes the n-th generation of a check: ours speaks twice first (then its routing is heard)."""

    def __init__(self, monkeypatch, change, at=3):
        self.calls = 0
        real = check_module.generate_greedy

        def generate(model, ids, new_tokens):
            found = real(model, ids, new_tokens)
            self.calls += 1
            return change(found) if self.calls == at else found

        monkeypatch.setattr(check_module, "generate_greedy", generate)
        monkeypatch.setattr(reference_module, "generate_greedy", generate)


def flipped_bit(found):
    logits = found.logits_BNV.clone()
    logits[0, 0, 0] = torch.nextafter(logits[0, 0, 0], torch.tensor(torch.inf))
    return Generation(found.tokens_BN, logits)


def other_token(found):
    tokens = found.tokens_BN.clone()
    tokens[0, 1] = (tokens[0, 1] + 1) % found.logits_BNV.shape[-1]
    return Generation(tokens, found.logits_BNV)


@pytest.mark.parametrize("change", [flipped_bit, other_token])
def test_one_different_case_fails_the_check(folder, monkeypatch, change):
    Spoiler(monkeypatch, change)
    report = check_model(folder, ALONE)
    assert [case.identical for case in report.cases].count(False) == 1
    assert not report.identical
    assert not report.passed


def test_another_token_than_the_plain_model_fails_in_fp32(folder, monkeypatch):
    Spoiler(monkeypatch, other_token)  # here the plain model is the next to speak
    report = check_model(folder, SHORT)
    assert report.identical
    assert report.reference_passed is False
    assert not report.passed
    assert report.cases[0].divergences[0].position == 1


def test_logits_outside_the_tolerance_fail(folder, monkeypatch):
    Spoiler(monkeypatch, lambda found: Generation(found.tokens_BN, found.logits_BNV * 1.5))
    report = check_model(folder, SHORT)
    assert report.identical
    assert not report.passed


@pytest.mark.parametrize(
    "settings",
    [{"shares": (0.0,)}, {"shares": (1.1,)}, {"batch_sizes": (0,)}, {"prompt_tokens": 0}, {"new_tokens": 0}],
)
def test_impossible_settings(settings):
    with pytest.raises(UsageError):
        CheckSettings(**settings)
