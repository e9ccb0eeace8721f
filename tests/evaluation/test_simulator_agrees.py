"""Replaying a trace gives the live engine's hits, event by event, whatever the speed of the disk."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gangline
from gangline.core.events import RoutingEvent
from gangline.evaluation.policy_runs import Piece, cut_pieces, model_parts, record_pieces, run_live
from gangline.evaluation.simulation import SimulationSettings, simulate_trace
from gangline.policies.compositions import COMPOSITIONS
from gangline.policies.parts import LEARNED
from gangline.policies.predictors.saved import load_predictor
from gangline.runtime import readers
from gangline.runtime.files import ExpertFiles
from gangline.runtime.lease import EventLease
from gangline.traces import Trace
from gangline.traces.simulator.level import Level
from runtime.test_policies_live import learned
from tiny_models import VOCABULARY, tiny_model

COMPARED = sorted(name for name, found in COMPOSITIONS.items() if found.exact)
Hits = list[tuple[int, str, tuple[int, ...], tuple[int, ...]]]


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hits, Hits]]:
    """Layer, phase, experts and hits of every event: live, and simulated."""
    live: Hits = []
    simulated: Hits = []
    count, note = EventLease._count, Level.note

    def counted(self: EventLease, event: RoutingEvent, present: set[int]) -> None:
        live.append((event.layer, event.phase, event.experts, tuple(sorted(present))))
        count(self, event, present)

    def noted(self: Level, event: RoutingEvent, *of_two: Any) -> tuple[int, ...]:
        found = note(self, event, *of_two)
        simulated.append((event.layer, event.phase, event.experts, found))
        return found

    monkeypatch.setattr(EventLease, "_count", counted)
    monkeypatch.setattr(Level, "note", noted)
    yield live, simulated


@pytest.fixture
def uneven_disk(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Reads that take anything from no time to longer than a layer."""
    waits, read = np.random.default_rng(seed), ExpertFiles.read

    def slow(self: ExpertFiles, *values: Any) -> None:
        time.sleep(float(waits.choice([0.0, 0.0, 0.0005, 0.003])))
        read(self, *values)

    monkeypatch.setattr(ExpertFiles, "read", slow)
    monkeypatch.setattr(readers, "native", lambda: None)  # whose reads do not go through here


def unrounded(model: Any, trace: Trace, pieces: Sequence[Piece]) -> Trace:
    """The trace with inputs and logits as the engine sees them: files hold 16 bits, which near ties feel."""
    kept: list[list[Tensor]] = [[] for _ in trace.layers]
    weights: list[list[Tensor]] = [[] for _ in trace.layers]

    def keep(layer: int, x_TD: Tensor, _ids: Tensor, weights_TK: Tensor) -> None:
        kept[layer].append(x_TD.float().clone())
        weights[layer].append(weights_TK.float().clone())

    with model.gangline.observed(keep):
        run_live(model, pieces)
    parts = model_parts(model)
    assert parts.gates is not None
    layers = {}
    for number in trace.layers:
        # Pass by pass, as the engine asks: a product over other rows may round otherwise.
        scores_RE = np.concatenate([parts.gates[number](x_TD) for x_TD in kept[number]])
        inputs_RD = torch.cat(kept[number]).numpy()
        weights_RK = torch.cat(weights[number]).numpy()
        layers[number] = replace(
            trace.layer(number), inputs_RD=inputs_RD, logits_RN=np.log(scores_RE), weights_RK=weights_RK
        )
    return Trace(trace.header, trace.documents, trace.tokens, layers, name=trace.name)


@pytest.mark.parametrize("slots", [5, 11, 19])
def test_every_exact_composition(
    slots: int, hits: tuple[Hits, Hits], uneven_disk: None, seed: int, tmp_path: Path
) -> None:
    model = tiny_model("olmoe", seed=seed, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "m")
    pieces = cut_pieces(None, VOCABULARY, [], prompt=10, following=6, count=4)
    live, simulated = hits
    with gangline.load(tmp_path / "m", progress=False, policy="default").gangline as runtime:
        trace = record_pieces(runtime._model, "tiny", pieces[1:], tmp_path / "trace")
        other = record_pieces(runtime._model, "tiny", pieces[:1], tmp_path / "other")
        trace = unrounded(runtime._model, trace, pieces[1:])
    with gangline.load(tmp_path / "m", progress=False, expert_slots=slots).gangline as runtime:
        for name in COMPARED:
            place = tmp_path / name
            place.mkdir()
            path = learned(model, name, place)
            if COMPOSITIONS[name].cache == "static-hot":
                path = str(tmp_path / "other")
            saved = load_predictor(Path(path)) if COMPOSITIONS[name].predictor in LEARNED else None
            runtime.use_policy(name, path)
            live.clear()
            simulated.clear()
            before = runtime.store.stats.bytes_read["demand"]
            run = run_live(runtime._model, pieces[1:])
            settings = SimulationSettings(
                (), (str(slots),), systems=(name,), oracles=(), calibration=other, link=1e8
            )
            parts = model_parts(runtime._model, saved and saved.network, saved and saved.kind)
            report = simulate_trace(trace, settings, model=parts).rows[0]
            assert live == simulated[: len(live)], name
            assert report.hit_rate == pytest.approx(run.hit_rate), name
            # What was read ahead and dropped may have begun or not; what was waited for is the same.
            demanded = runtime.store.stats.bytes_read["demand"] - before
            assert report.levels[0].bytes_moved["demand"] == demanded, name


@pytest.mark.parametrize(("policy", "slots"), [("hobbit", 9), ("lru", 14), ("layer-lru", 7)])
def test_two_precisions(
    policy: str, slots: int, hits: tuple[Hits, Hits], uneven_disk: None, seed: int, tmp_path: Path
) -> None:
    """Which copies of which experts have slots, how each expert is computed, and what is read for it."""
    tiny_model("olmoe", seed=seed, dtype=torch.float32).eval().save_pretrained(tmp_path / "m")
    pieces = cut_pieces(None, VOCABULARY, [], prompt=10, following=6, count=3)
    live, simulated = hits
    name = policy
    if policy != "hobbit":
        scope = "layer" if policy == "layer-lru" else "global"
        name = str(tmp_path / "mixed.yaml")
        rule = "{name: HobbitPrecision, high: 0.3, low: 0.7, share: 0.4, bits: int2}"
        Path(name).write_text(f"like: hobbit\ncache: {policy}\nscope: {scope}\nprecision: {rule}\n")
    loaded = gangline.load(tmp_path / "m", progress=False, expert_slots=slots, policy=name, mode="mixed")
    with loaded.gangline as runtime:
        trace = record_pieces(loaded, "tiny", pieces, tmp_path / "trace")
        runtime.use_policy(name, mode="mixed")  # what was computed depends on what was there: once more
        live.clear()
        simulated.clear()
        before = replace(runtime.store.stats, bytes_read=dict(runtime.store.stats.bytes_read))
        trace = unrounded(loaded, trace, pieces)
        after = runtime.store.stats
        of_both = tuple(
            sum(count for _, count, _ in pool) for pool in (runtime.plan.slots, runtime.plan.low_slots)
        )
        settings = SimulationSettings(
            (), (str(slots),), systems=(name,), oracles=(), link=1e8, slots_of_both=of_both
        )
        report = simulate_trace(trace, settings, model=model_parts(loaded)).rows[0]
    assert live == simulated[: len(live)]
    for count in ("hits", "misses", "low_hits", "low_misses", "skipped"):
        counted = sum(phase[count] for phase in report.phases.values())
        assert counted == getattr(after, count) - getattr(before, count), count
    demanded = after.bytes_read["demand"] - before.bytes_read["demand"]
    assert report.levels[0].bytes_moved["demand"] == demanded
    assert after.low_hits + after.low_misses > 0
