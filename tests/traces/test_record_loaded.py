"""Recording a loaded model: the engine tells of itself, its native decoding goes on, nothing changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gangline
from gangline.evaluation.generation import fixed_length
from gangline.runtime.native_decode import NativeDecode
from gangline.traces import Trace, TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.hooks import observe
from gangline.traces.recorder import Recorder
from tiny_models import VOCABULARY, tiny_model

NEW = 9


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    tiny_model("olmoe", seed=seed, dtype=torch.float32).eval().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def native_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step that ran natively."""
    seen: list[int] = []
    run = NativeDecode._run

    def counted(self: NativeDecode, *values: Any) -> Any:
        seen.append(1)
        return run(self, *values)

    monkeypatch.setattr(NativeDecode, "_run", counted)
    return seen


def generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with fixed_length(model, NEW), torch.inference_mode():
        found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask)
    return found


def record(model: Any, ids: Tensor, place: Path, mask: Tensor | None = None, **header: Any) -> Trace:
    with TraceWriter(place, describe_recording(model, "tiny", source="generation", **header)) as writer:
        recorder = Recorder(writer)
        with observe(model, recorder), recorder.documents([f"row {n}" for n in range(len(ids))]):
            generate(model, ids, mask)
    return open_trace(place)


@pytest.mark.parametrize("slots", [None, 8])
@pytest.mark.parametrize("mode", ["ids", "full"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_trace_is_what_the_engine_computed(
    rows: int, mode: str, slots: int | None, folder: Path, native_steps: list[int], tmp_path: Path
) -> None:
    ids = torch.randint(3, VOCABULARY, (rows, 6))
    with gangline.load(folder, expert_slots=slots).gangline as runtime:
        torch.manual_seed(1)
        want = generate(runtime._model, ids)
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in runtime.geometry.layers]

        def noted(layer: int, _: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
            seen[layer].append((ids_TK.clone(), weights_TK.clone()))

        with runtime.observed(noted):
            assert torch.equal(generate(runtime._model, ids), want)
        native_steps.clear()
        trace = record(runtime._model, ids, tmp_path / "t", mode=mode)
        assert len(native_steps) == NEW - 1
        assert runtime._engine.observer is None and runtime._engine.on_step is None
    assert len(trace) == rows * (6 + NEW - 1) and [p.stop - p.start for p in trace.passes][1:] == [rows] * (
        NEW - 1
    )
    for number in trace.layers:
        layer = trace.layer(number)
        assert np.array_equal(layer.ids_RK, torch.cat([a for a, _ in seen[number]]).numpy())
        if mode == "full":
            weights_RK = torch.cat([b for _, b in seen[number]]).float().numpy()
            assert np.allclose(layer.weights_RK, weights_RK, atol=1e-3)
        else:
            assert layer.weights_RK is None


def test_padding_of_native_steps(folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with gangline.load(folder).gangline as runtime:
        trace = record(runtime._model, ids, tmp_path / "t", mask, mode="ids")
    assert [d.tokens for d in trace.documents] == [6 + NEW - 1, 4 + NEW - 1]
    assert [p.stop - p.start for p in trace.passes] == [10] + [2] * (NEW - 1)


def test_extras_are_the_routers_own(folder: Path, native_steps: list[int], tmp_path: Path) -> None:
    """Logits recorded beside native decoding choose the recorded experts."""
    ids = torch.randint(3, VOCABULARY, (1, 7))
    with gangline.load(folder, expert_slots=9).gangline as runtime:
        trace = record(runtime._model, ids, tmp_path / "t", extras=("logits", "inputs"))
    assert len(native_steps) == NEW - 1
    for number in trace.layers:
        layer, k = trace.layer(number), trace.header.top_k[number]
        assert layer.logits_RN is not None and layer.inputs_RD is not None
        assert layer.inputs_RD.shape == (len(trace), 32)
        chosen_RK = np.take_along_axis(layer.logits_RN.astype(np.float32), layer.ids_RK.astype(int), 1)
        kth_R = np.sort(layer.logits_RN.astype(np.float32), axis=1)[:, -k]
        assert (chosen_RK.min(1) >= kth_R - 1e-2 * np.abs(layer.logits_RN).max()).all()
