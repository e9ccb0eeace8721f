"""The plan of a loaded model: what loading left of the reserve becomes slots, and the budget still holds."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import gangline
from gangline.core.errors import UsageError
from gangline.kernels.cpu import native
from gangline.runtime import load
from gangline.runtime.embedding import RESIDENT_BYTES
from gangline.runtime.footprint import Footprint
from gangline.runtime.planner import (
    NATIVE_RESERVE,
    RUNTIME_RESERVE,
    PlanRequest,
    make_plan,
    plan_loaded,
)
from runtime.footprint_rig import MIB, make_footprint
from tiny_models import VOCABULARY, tiny_model

FREED = RUNTIME_RESERVE - NATIVE_RESERVE


def footprint(table: int = 0, experts: int = 1024) -> Footprint:
    """Experts of 1 MiB, and 300 MiB of dense weights."""
    return make_footprint(experts, dense=300 * MIB, table=table)


REQUEST = PlanRequest("m", 1024 * MIB, "int4", 16, process=200 * MIB)


@pytest.mark.parametrize("table", [0, 100 * MIB])
def test_what_loading_left_of_the_reserve_becomes_slots(table):
    needs = footprint(table)
    plan = make_plan(REQUEST, needs)
    dense = plan.dense - plan.in_file - (RESIDENT_BYTES if table else 0)
    for taken in (-5, 0, 20):  # below zero: dense weights that nobody has looked at yet are counted as there
        again = plan_loaded(plan, REQUEST, needs, 200 * MIB + dense + taken * MIB)
        assert again.experts_resident - plan.experts_resident == FREED // MIB - max(0, taken)
        assert again.peak <= REQUEST.budget
    used_up = plan_loaded(plan, REQUEST, needs, 200 * MIB + dense + FREED)
    assert used_up is plan


def test_a_plan_that_needs_no_more_slots_stays():
    small = footprint(experts=8)
    whole = make_plan(REQUEST, small)
    assert whole.everything_resident and plan_loaded(whole, REQUEST, small, 500 * MIB) is whole
    asked = PlanRequest("m", None, "int4", 16, process=200 * MIB, expert_slots=40)
    plan = make_plan(asked, footprint())
    assert plan.experts_resident == 40 and plan_loaded(plan, asked, footprint(), 500 * MIB) is plan


def test_memory_that_was_free_counts_what_loading_took():
    request = PlanRequest("m", None, "int4", 16, process=200 * MIB, available=800 * MIB)
    plan = make_plan(request, footprint())
    again = plan_loaded(plan, request, footprint(), (500 + 20) * MIB)
    assert again.experts_resident - plan.experts_resident == FREED // MIB - 20
    assert again.peak <= plan.process + request.available


@pytest.mark.skipif(native() is None, reason="the native core is not built")
def test_a_loaded_model_has_more_slots_and_stays_within_its_budget(tmp_path: Path, seed):
    """In a process of its own, in a budget that the plan from headers fills to the last slot."""
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    OlmoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    code = (
        "import sys, json, torch, gangline\n"
        "from gangline.runtime.runtime import peak_resident\n"
        "asked = dict(ctx_size=200, precision='int8', progress=False)\n"
        "smallest = gangline.plan(sys.argv[1], **asked).smallest_advised\n"
        "before = gangline.plan(sys.argv[1], memory=smallest, **asked)\n"
        "torch.manual_seed(int(sys.argv[2]))\n"
        "model = gangline.load(sys.argv[1], memory=smallest, native_only=True, **asked)\n"
        "for tokens in (1, 20, 160):\n"
        "    ids = torch.randint(3, 500, (1, tokens))\n"
        "    sampled = dict(do_sample=tokens == 20, pad_token_id=0, eos_token_id=None)\n"
        "    model.generate(ids, max_new_tokens=30, **sampled)\n"
        "plan = model.gangline.plan\n"
        "read = len(model.gangline.store.residency())\n"
        "print(json.dumps({'peak': peak_resident(), 'budget': smallest, 'planned': before.experts_resident,\n"
        "                  'slots': plan.experts_resident, 'used': read}))\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "model"), str(seed)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["budget"], found
    assert found["planned"] < found["slots"] < 256, found
    assert found["used"] == found["slots"], found


@pytest.mark.skipif(native() is None, reason="the native core is not built")
@pytest.mark.parametrize("how", [{}, {"policy": "hobbit", "mode": "mixed"}])
def test_room_for_every_expert_that_only_loading_shows(tmp_path: Path, how, monkeypatch, seed):
    """Copies in low precision, for which a model was loaded, keep their slots then."""
    tiny_model("olmoe", seed=seed).save_pretrained(tmp_path / "model")
    asked = {"precision": "int4", "ctx_size": 60, "progress": False}
    ids_BP = torch.randint(3, VOCABULARY, (1, 12))

    def generated(**more):
        model = gangline.load(tmp_path / "model", native_only=True, **asked, **more)
        with model.gangline as runtime:
            out = model.generate(ids_BP, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
            return out.tolist(), runtime.plan

    expected, _ = generated()

    def with_few_slots(request, footprint, notes=()):
        return make_plan(dataclasses.replace(request, expert_slots=12), footprint, notes)

    monkeypatch.setattr(load, "make_plan", with_few_slots)
    found, plan = generated(memory="64GiB", **how)
    assert plan.everything_resident == (not how) and bool(plan.low_slots) == bool(how)
    assert how or found == expected


@pytest.mark.skipif(native() is None, reason="the native core is not built")
def test_slots_that_take_torchs_reserve_leave_no_room_for_torch(tmp_path: Path, monkeypatch, seed):
    """Only who asked for it gets them; what torch would compute is refused then, and served otherwise."""
    tiny_model("olmoe", seed=seed).save_pretrained(tmp_path / "model")
    ids_BP = torch.randint(3, VOCABULARY, (1, 12))
    grown = []

    def counted(plan, *arguments):
        grown.append(plan)
        return plan_loaded(plan, *arguments)

    def with_few_slots(request, footprint, notes=()):
        return make_plan(dataclasses.replace(request, expert_slots=12), footprint, notes)

    monkeypatch.setattr(load, "plan_loaded", counted)
    monkeypatch.setattr(load, "make_plan", with_few_slots)
    for native_only in (False, True):
        asked = {"precision": "int4", "ctx_size": 60, "progress": False, "native_only": native_only}
        model = gangline.load(tmp_path / "model", memory="64GiB", **asked)
        with model.gangline, torch.no_grad():
            assert len(grown) == native_only
            assert model(ids_BP, logits_to_keep=1).logits.shape[1] == 1
            if not native_only:
                assert len(model(ids_BP, logits_to_keep=1, output_hidden_states=True).hidden_states) > 1
                continue
            with pytest.raises(UsageError, match="load it without native_only"):
                model(ids_BP, logits_to_keep=1, output_hidden_states=True)
