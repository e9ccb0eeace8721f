"""Tuning: the same pieces recorded, simulated and live; the choice is kept and followed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gangline
from evaluation.tiny_text import saved_model
from gangline.core.errors import UsageError
from gangline.evaluation.plain import find_checkpoint, load_tokenizer
from gangline.evaluation.policy_runs import cut_pieces, model_parts, record_pieces, run_live
from gangline.evaluation.simulation import SimulationSettings, simulate_trace
from gangline.evaluation.tuning import TuneSettings, tune_model
from gangline.policies.compositions import COMPOSITIONS, find_composition
from gangline.runtime.policy_choice import PolicyChoice, store_tuned, tuned_file

FEW = {"prompt_tokens": 6, "new_tokens": 4, "pieces": 2, "rounds": 1}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("GANGLINE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), "olmoe", seed=5)


def budget(folder):
    """A memory budget that still suffices when this process has grown a little."""
    smallest = gangline.plan(folder, memory="64GiB").smallest_advised
    return smallest + 64 * 2**20


def test_pieces_are_evenly_cut(folder, tmp_path):
    tokenizer = load_tokenizer(find_checkpoint(folder))
    text = "".join(chr(97 + n % 26) for n in range(200))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[::-1])
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    pieces = cut_pieces(tokenizer, 96, files, prompt=5, following=3, count=5)
    assert [len(p.prompt) for p in pieces] == [5] * 5 and [p.tokens for p in pieces] == [7] * 5
    assert sum("a.txt" in p.source for p in pieces) == 3
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(pieces[0].prompt + pieces[0].following) == whole[:8]
    assert len({p.prompt for p in pieces}) == 5
    with pytest.raises(UsageError, match="give a text of more than 300"):
        cut_pieces(tokenizer, 96, files, prompt=200, following=100, count=2)
    with pytest.raises(UsageError, match="cannot be read"):
        cut_pieces(tokenizer, 96, [tmp_path / "none"], prompt=2, following=2, count=2)
    assert len(cut_pieces(None, 96, [], prompt=2, following=2, count=3)) == 3


def test_what_is_simulated_is_what_runs(folder, tmp_path):
    """Where nothing is predicted, replaying the recorded pieces gives the live hits, misses and bytes."""
    model = gangline.load(folder, expert_slots=15)
    pieces = cut_pieces(load_tokenizer(find_checkpoint(folder)), 96, [], prompt=1, following=9, count=3)
    with model.gangline as runtime:
        trace = record_pieces(model, "tiny", pieces, tmp_path / "t")
        for name in ("layer-lru", "freetoken", "towards-moe-deployment"):
            runtime.use_policy(name)
            live = run_live(model, pieces)
            settings = SimulationSettings((), ("15",), systems=(name,), oracles=(), link=1e12)
            row = simulate_trace(trace, settings, model=model_parts(model)).rows[0]
            assert live.tokens == row.tokens == len(trace) == 27
            assert live.hit_rate == pytest.approx(row.hit_rate)
            assert live.bytes_read == sum(row.levels[0].bytes_moved.values())
            assert live.bytes_ahead == 0 and live.decoded == 24


def test_every_exact_system_can_be_simulated_with_the_model_at_hand(folder, tmp_path):
    model = gangline.load(folder, expert_slots=12)
    pieces = cut_pieces(None, 96, [], prompt=4, following=5, count=3)
    with model.gangline:
        trace = record_pieces(model, "tiny", pieces, tmp_path / "t")
        settings = SimulationSettings((), ("12",), systems=("all",), oracles=(), calibration=trace)
        result = simulate_trace(trace, settings, model=model_parts(model))
        mixed = SimulationSettings((), ("12",), systems=("hobbit",), oracles=())
        row = simulate_trace(trace, mixed, model=model_parts(model)).rows[0]
    names = {row.policy for row in result.rows}
    learned = {"sida", "pre-gated", "expertflow", "read-me"}
    assert {name for name, found in COMPOSITIONS.items() if found.exact} - learned <= names
    assert {note.split()[0] for note in result.notes if "left out" in note} == learned
    assert not row.exact and row.of_belady is None
    assert row.phases["decode"]["low_hits"] + row.phases["decode"]["low_misses"] > 0


def test_the_choice_is_kept_and_followed(folder, tmp_path, monkeypatch):
    memory = budget(folder)
    monkeypatch.setattr("gangline.evaluation.tuning._MARGIN", 0.0)
    monkeypatch.setattr("gangline.evaluation.tuning._Tuning._live", _freetoken_wins)
    monkeypatch.setattr("gangline.runtime.planner.MemoryPlan.everything_resident", False)
    report = tune_model(folder, TuneSettings(**FEW), memory=memory)
    assert report.choice in {item.name for item in report.candidates if item.ratio}
    assert report.choice != "default" and report.stored is not None
    kept = json.loads(Path(report.stored).read_text())
    assert kept["policy"] == report.choice and kept["memory"] == memory
    for options, name, source in (
        ({"memory": memory}, report.choice, "tuned"),
        ({"memory": memory, "policy": "default"}, "default", "asked"),
        ({"memory": memory + 2**20}, "default", "default"),
        ({"memory": memory, "precision": "int8"}, "default", "default"),
        ({"expert_slots": 9}, "default", "default"),
    ):
        with gangline.load(folder, **options).gangline as runtime:
            assert (runtime.policy.name, runtime.policy.source) == (name, source), options
            assert ("tuned" in runtime.banner()) == (source == "tuned")


def _freetoken_wins(self, names):
    runs = {name: [run_live(self.model, self.pieces[:1])] for name in names}
    base = runs["default"][0]
    for name in names:
        faster = 1.0 if name == "default" else 2.0
        decode = replace(base.decode, seconds=base.decode.seconds / faster)
        prompt = replace(base.prompt, seconds=base.prompt.seconds / faster)
        runs[name] = [replace(base, prompt=prompt, decode=decode)]
    return runs


def test_tuning_runs_and_may_store_nothing(folder):
    report = tune_model(folder, TuneSettings(**FEW, store=False), expert_slots=12)
    assert report.stored is None and report.choice is not None and report.slots == 12
    confirmed = [item for item in report.candidates if item.ratio is not None]
    assert len(confirmed) in (3, 4) and all(len(item.tokens_per_second) == 1 for item in confirmed)
    assert next(item.ratio for item in confirmed if item.name == "default") == 1.0
    everything = tune_model(folder, TuneSettings(**FEW))
    assert everything.choice is None and "all experts are in memory" in everything.notes[0]


def test_a_choice_that_cannot_be_followed_is_passed_over(tmp_path, caplog):
    from gangline.runtime.policy_choice import tuned_policy

    assert tuned_policy("m", "stored", 5) is None
    file = tuned_file("m", "stored", 5)
    learned = tmp_path / "p.safetensors"
    learned.write_text("")
    store_tuned(file, PolicyChoice("sida", find_composition("sida"), "asked", learned), {})
    found = tuned_policy("m", "stored", 5)
    assert (found.name, found.source, found.learned) == ("sida", "tuned", learned)
    assert found.composition == find_composition("sida")
    assert tuned_policy("m", "stored", None) is None and tuned_policy("n", "stored", 5) is None
    learned.unlink()
    assert tuned_policy("m", "stored", 5) is None and "is gone" in caplog.text
    file.write_text("{}")
    assert tuned_policy("m", "stored", 5) is None and "not a choice of this version" in caplog.text


def test_a_trace_of_another_model_is_refused(folder, tmp_path, seed):
    other = saved_model(tmp_path / "other", "mixtral", seed=seed)
    model = gangline.load(other)
    pieces = cut_pieces(None, 96, [], prompt=3, following=3, count=1)
    with model.gangline:
        record_pieces(model, "other", pieces, tmp_path / "t")
    with pytest.raises(UsageError, match="is of other"):
        tune_model(folder, TuneSettings(**FEW, trace=tmp_path / "t"), expert_slots=12)
    assert torch.is_grad_enabled()
