"""Prompts of loaded models: wherever their experts lie, and however they are fed, the same bits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gangline
from gangline.kernels.cpu import native
from gangline.runtime import native_decode
from gangline.traces import TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.hooks import observe
from gangline.traces.recorder import Recorder
from native_rig import feed, same
from tiny_models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(native() is None, reason="the native core is not built")

FAMILIES = ["olmoe", "qwen2_moe", "mixtral", "glm4_moe"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each sequence in every native pass."""
    counts: list[int] = []
    run = native_decode.NativeDecode._run

    def counted(self: Any, step: Any) -> Any:
        counts.append(step.ids_BS.shape[1])
        return run(self, step)

    monkeypatch.setattr(native_decode.NativeDecode, "_run", counted)
    return counts


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, seed: int, tmp_path: Path) -> Path:
    tiny_model(request.param, seed=seed).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def prompt(batch: int = 2, tokens: int = 21, padding: int = 5) -> tuple[Tensor, Tensor]:
    ids_BP = torch.randint(3, VOCABULARY, (batch, tokens))
    mask_BP = torch.ones_like(ids_BP)
    mask_BP[0, :padding] = 0
    return ids_BP, mask_BP


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_offloaded_and_resident_experts_give_the_same_bits(
    folder: Path, precision: str, passes: list[int]
) -> None:
    ids_BP, mask_BP = prompt()
    fed = []
    for slots in (None, 12):
        with gangline.load(folder, precision=precision, expert_slots=slots).gangline as runtime:
            assert runtime.plan.everything_resident == (slots is None)
            pieces = ([21], [8, 1, 12], [1] * 21)
            fed += [feed(runtime._model, ids_BP, mask_BP, sizes) for sizes in pieces]
    assert passes == 2 * ([21, 8, 1, 12] + [1] * 21)
    assert all(same(fed[0], other, [5, 0]) for other in fed[1:])


@pytest.mark.parametrize("folder", ["olmoe", "qwen2_moe"], indirect=True)
def test_many_pairs_are_computed_in_runs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
    ids_BP, mask_BP = prompt(tokens=330, padding=50)
    fed = []
    for slots in (None, 20):
        with gangline.load(folder, precision="int8", expert_slots=slots, ctx_size=1024).gangline as runtime:
            fed += [
                feed(runtime._model, ids_BP, mask_BP, sizes) for sizes in ([330], [100, 230], [40] * 8 + [10])
            ]
    assert all(same(fed[0], other, [50, 0]) for other in fed[1:])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("slots", [None, 12])
def test_answers_do_not_depend_on_the_loop_or_on_chunks(
    folder: Path, slots: int | None, sampled: bool, passes: list[int]
) -> None:
    ids_BP, mask_BP = prompt()
    settings = {"max_new_tokens": 12, "do_sample": sampled, "eos_token_id": None, "pad_token_id": 0}
    answers = []
    with gangline.load(folder, precision="int4", expert_slots=slots).gangline as runtime:
        for chunk, theirs in ((None, False), (None, True), (6, False), (6, True)):
            runtime._model.generation_config.prefill_chunk_size = chunk
            torch.manual_seed(5)
            passes.clear()
            out = runtime._model.generate(
                ids_BP, attention_mask=mask_BP, return_dict_in_generate=theirs, **settings
            )
            answers.append(out.sequences if theirs else out)
            prompts = [21] if chunk is None else [6, 6, 6, 3]
            # A session takes its steps past the model's forward.
            assert passes == prompts + [1] * (11 if theirs or slots is not None else 0)
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_the_trace_of_a_prompt_is_what_was_computed(folder: Path, passes: list[int], tmp_path: Path) -> None:
    ids_BP, mask_BP = prompt(padding=0)
    with gangline.load(folder, precision="int4").gangline as runtime:
        seen: list[list[Tensor]] = [[] for _ in runtime.geometry.layers]
        with runtime.observed(lambda layer, _x, ids_TK, _w: seen[layer].append(ids_TK.clone())):
            feed(runtime._model, ids_BP, mask_BP, [21])
        header = describe_recording(runtime._model, "tiny", source="generation", mode="full")
        with TraceWriter(tmp_path / "trace", header) as writer:
            recorder = Recorder(writer)
            with observe(runtime._model, recorder), recorder.documents(["one", "two"]):
                feed(runtime._model, ids_BP, mask_BP, [18, 2, 1])
    assert passes == [21, 18, 2, 1]
    trace = open_trace(tmp_path / "trace")
    assert [part.stop - part.start for part in trace.passes] == [36, 4, 2]
    for number in trace.layers:
        ids_BPK = seen[number][0].view(2, 21, -1)
        fed = torch.cat([part.flatten(0, 1) for part in ids_BPK.split([18, 2, 1], dim=1)])
        assert (trace.layer(number).ids_RK == fed.numpy()).all()


def test_counts_of_a_prompt_are_those_of_the_modules(folder: Path) -> None:
    ids_BP, mask_BP = prompt()
    counts = []
    for keep in (1, 0):  # all logits are the modules' to give
        with gangline.load(folder, precision="int8").gangline as runtime:
            with torch.no_grad():
                runtime._model(ids_BP, attention_mask=mask_BP, logits_to_keep=keep)
            stats = runtime.stats()
            counts.append((stats.prefill_tokens, stats.decode_tokens, stats.host_misses))
    assert counts == [(42, 0, 0)] * 2


def test_stored_weights_leave_prompts_to_the_modules(folder: Path, passes: list[int]) -> None:
    ids_BP, mask_BP = prompt()
    with gangline.load(folder).gangline as runtime:
        feed(runtime._model, ids_BP, mask_BP, [20, 1])
    assert passes == [1]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    core: Any = native()
    before = core.threads()
    core.set_threads(2)
    yield
    core.set_threads(before)
