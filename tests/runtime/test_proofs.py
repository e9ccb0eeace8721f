"""What a model proved once is believed again for the same model, code and machine, and for nothing else."""

import json
import os
import random

import pytest
import torch
from transformers.models.olmoe import modeling_olmoe

import gangline
from gangline.core.errors import ConformanceError
from gangline.kernels.cpu import native
from gangline.runtime import load, native_decode, proofs
from gangline.runtime.native_decode import NativeDecode
from gangline.runtime.proofs import Proofs, proof_facts
from tiny_models import tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def facts(seed):
    return {"files": str(seed), "kernels": ["a", 2]}


@pytest.fixture
def model(seed):
    return tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()


class Check:
    """A check that counts how often it ran, and fails if told so."""

    def __init__(self, fails=False):
        self.ran = 0
        self.fails = fails

    def __call__(self):
        self.ran += 1
        if self.fails:
            raise ConformanceError("it differs; report it")


def prove(facts, name="native decode", fails=False):
    check = Check(fails)
    Proofs(facts).once(name, check)
    return check.ran


def test_proves_once(facts):
    assert [prove(facts) for _ in range(3)] == [1, 0, 0]


def test_checks_are_kept_side_by_side(facts):
    assert [prove(facts, "one"), prove(facts, "two"), prove(facts, "one"), prove(facts, "two")] == [
        1,
        1,
        0,
        0,
    ]


def test_without_facts_every_check_runs(home):
    assert [prove(None), prove(None)] == [1, 1]
    assert not (home / "proofs").exists()


def test_other_facts_prove_anew(facts):
    prove(facts)
    for key in facts:
        assert prove(facts | {key: "other"}) == 1
    assert prove(facts) == 0


def test_what_failed_is_not_kept(facts):
    with pytest.raises(ConformanceError):
        prove(facts, fails=True)
    assert prove(facts) == 1


@pytest.mark.parametrize("damage", ["cut", "text", "bytes", "list", "facts", "passed", "empty"])
def test_a_damaged_record_is_not_believed(facts, home, seed, damage):
    prove(facts)
    (file,) = (home / "proofs").iterdir()
    written = file.read_bytes()
    record = json.loads(written)
    file.write_bytes(
        {
            "cut": written[: random.Random(seed).randrange(1, len(written))],
            "text": b"proved",
            "bytes": b"\xff\xfe\x00" * 20,
            "list": json.dumps([record]).encode(),
            "facts": json.dumps(record | {"facts": facts | {"files": "other"}}).encode(),
            "passed": json.dumps(record | {"passed": True}).encode(),
            "empty": b"",
        }[damage]
    )
    assert [prove(facts), prove(facts)] == [1, 0]
    assert file.read_bytes() == written
    assert [item.name for item in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_proves_every_time(facts, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "file"))
    assert [prove(facts), prove(facts)] == [1, 1]


def test_facts_come_back_as_they_were_written(model):
    facts = proof_facts(model, "identity", None)
    assert json.loads(json.dumps(facts)) == facts


def test_equal_models_have_equal_facts(model, seed):
    twin = tiny_model("olmoe", seed=seed + 1, dtype=torch.float32).eval()
    assert proof_facts(model, "identity", None) == proof_facts(twin, "identity", None)


def _forward(self, hidden_states):
    return hidden_states


def _rotate(x):
    return -x


def _config(model, _):
    model.config.rope_theta = 12345.0


def _attention(model, _):
    model.config._attn_implementation = "eager"


def _method(_, patch):
    patch.setattr(modeling_olmoe.OlmoeRMSNorm, "forward", _forward)


def _function(_, patch):
    patch.setattr(modeling_olmoe, "rotate_half", _rotate)


def _version(_, patch):
    patch.setattr(proofs.transformers, "__version__", "0.0")


def _switch(_, patch):
    patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")


def _threads(_, patch):
    patch.setattr(torch, "get_num_threads", lambda: 77)


def _dtype(model, _):
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [_config, _attention, _method, _function, _version, _switch, _threads, _dtype]
)
def test_facts_tell_what_differs(model, monkeypatch, change):
    before = proof_facts(model, "identity", None)
    change(model, monkeypatch)
    assert proof_facts(model, "identity", None) != before


def test_facts_tell_files_and_codecs_apart(model):
    known = [proof_facts(model, *other) for other in (("a", None), ("b", None), ("a", "tile16:int4g32"))]
    assert all(known[i] != known[j] for i in range(3) for j in range(i))


@pytest.mark.skipif(native() is None, reason="the native core was not built")
def test_facts_tell_instruction_sets_apart(model):
    core = native()
    before, chosen = proof_facts(model, "identity", None), core.kernels_name()
    other = next((name for name in core.usable_kernels() if name != chosen), None)
    if other is None:
        pytest.skip("this processor has one instruction set")
    try:
        core.use_kernels(other)
        assert proof_facts(model, "identity", None) != before
    finally:
        core.use_kernels(chosen)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checks(monkeypatch):
    """Count the proofs that a load runs."""
    counts = {"conformance": 0, "native": 0}

    def counted(module, name, key):
        real = getattr(module, name)

        def call(*args, **kwargs):
            counts[key] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(load, "check_conformance", "conformance")
    counted(native_decode, "check_native", "native")
    return counts


def logits_of(folder, ids):
    with gangline.load(folder).gangline as runtime, torch.inference_mode():
        return runtime._model(ids).logits


def test_a_second_load_proves_nothing_and_computes_the_same(saved, checks, model, seed):
    ids = tiny_inputs(model)["input_ids"]
    first = logits_of(saved, ids)
    ran = dict(checks)
    assert ran["conformance"] == 1
    assert ran["native"] == (native() is not None)
    assert torch.equal(logits_of(saved, ids), first)
    assert checks == ran


def test_weights_that_changed_are_proved_again(saved, checks, seed):
    gangline.load(saved).gangline.close()
    ran = dict(checks)
    file = saved / "model.safetensors"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    gangline.load(saved).gangline.close()
    assert checks == {name: 2 * count for name, count in ran.items()}


def test_a_model_that_differs_is_refused_in_spite_of_a_record(saved, monkeypatch):
    gangline.load(saved).gangline.close()
    real = modeling_olmoe.OlmoeTopKRouter.forward

    def halved(self, hidden_states):
        logits, weights, ids = real(self, hidden_states)
        return logits, weights / 2, ids

    monkeypatch.setattr(modeling_olmoe.OlmoeTopKRouter, "forward", halved)
    with pytest.raises(ConformanceError):
        gangline.load(saved)


@pytest.mark.skipif(native() is None, reason="the native core was not built")
def test_native_decode_that_differs_is_left_out_in_spite_of_a_record(saved, monkeypatch):
    made = []
    real = modeling_olmoe.OlmoeRMSNorm.forward

    def doubled(self, hidden_states):
        return 2 * real(self, hidden_states)

    class Noted(NativeDecode):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(native_decode, "NativeDecode", Noted)
    gangline.load(saved).gangline.close()
    assert len(made) == 1
    monkeypatch.setattr(modeling_olmoe.OlmoeRMSNorm, "forward", doubled)
    gangline.load(saved).gangline.close()
    assert len(made) == 1
