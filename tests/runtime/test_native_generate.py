"""The decoding loop around native sessions against transformers' loop around the same native steps."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import gangline
from gangline.core.errors import ContextError
from gangline.kernels.cpu import native
from gangline.runtime import native_session
from tiny_models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(native() is None, reason="the native core is not built")


def save_tiny(family: str, folder: Path, seed: int) -> str:
    tiny_model(family, seed=seed).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["olmoe", "qwen2_moe", "mixtral"])
def model(request: pytest.FixtureRequest, seed: int, tmp_path: Path) -> Iterator[Any]:
    loaded = gangline.load(save_tiny(request.param, tmp_path, seed=seed))
    yield loaded
    loaded.gangline.close()


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each session took."""
    counts: list[int] = []
    begin, step = native_session.NativeSession.__init__, native_session.NativeSession.step

    def counted_begin(self: Any, *args: Any) -> None:
        counts.append(0)
        begin(self, *args)

    def counted_step(self: Any, tokens: Any) -> Tensor:
        counts[-1] += 1
        return step(self, tokens)

    monkeypatch.setattr(native_session.NativeSession, "__init__", counted_begin)
    monkeypatch.setattr(native_session.NativeSession, "step", counted_step)
    return counts


def prompt(batch: int = 1, tokens: int = 9, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, inputs: dict[str, Tensor], theirs: bool = False, **settings: Any) -> Any:
    """What ``generate`` says; ``theirs`` asks for the cache too, which our loop leaves to transformers'."""
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | settings
    torch.manual_seed(7)
    if theirs:
        return model.generate(**inputs, **settings, return_dict_in_generate=True).sequences
    return model.generate(**inputs, **settings)


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (1, 3), (3, 0), (3, 4)])
@pytest.mark.parametrize("sampled", [False, True])
def test_same_tokens_as_transformers_loop(
    model: Any, sessions: list[int], batch: int, padding: int, sampled: bool
) -> None:
    inputs = prompt(batch, 9, padding)
    ours = answer(model, inputs, do_sample=sampled)
    assert sessions == [19]
    assert torch.equal(ours, answer(model, inputs, theirs=True, do_sample=sampled))
    assert sessions == [19]


def test_sequences_end_one_by_one(model: Any, sessions: list[int]) -> None:
    inputs = prompt(4)
    free = answer(model, inputs)[:, 9:]
    ends = [int(free[0, 3]), int(free[1, 11])]
    settings = {"eos_token_id": ends, "pad_token_id": 2}
    ours = answer(model, inputs, **settings)
    assert torch.equal(ours, answer(model, inputs, theirs=True, **settings))
    assert sessions[1] == ours.shape[1] - 10 < 20
    assert (ours[0, 13:] == 2).all() or int(ours[0, 12]) not in ends


def test_processors_and_streamers_see_every_token(model: Any, sessions: list[int]) -> None:
    class Forced(LogitsProcessor):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen.append(input_ids.shape[1])
            assert scores.dtype == torch.float32
            return scores.masked_fill(torch.arange(scores.shape[1]) != int(input_ids[0, -1]) // 2, -torch.inf)

    class Heard:
        def __init__(self) -> None:
            self.values: list[list[int]] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    inputs = prompt()
    heard, forced = [Heard(), Heard()], [Forced(), Forced()]
    ours, theirs = (
        answer(model, inputs, bool(i), streamer=heard[i], logits_processor=LogitsProcessorList([forced[i]]))
        for i in (0, 1)
    )
    assert sessions == [19] and torch.equal(ours, theirs)
    assert forced[0].seen == forced[1].seen == list(range(9, 29))
    assert heard[0].values == heard[1].values and heard[0].ended == heard[1].ended == 1
    assert heard[0].values == [inputs["input_ids"][0].tolist(), *([t] for t in ours[0, 9:].tolist())]


def test_counts_what_transformers_loop_counts(model: Any) -> None:
    inputs = prompt(2)
    counts = []
    for theirs in (False, True):
        before = model.gangline.stats()
        answer(model, inputs, theirs)
        after = model.gangline.stats()
        fields = ("prefill_tokens", "decode_tokens", "host_hits", "host_misses")
        counts.append([getattr(after, name) - getattr(before, name) for name in fields])
    assert counts[0] == counts[1] and counts[0][1] == 2 * 19


def test_cache_grows_within_a_session(model: Any, sessions: list[int]) -> None:
    inputs = prompt()
    model.config.max_position_embeddings = 1024
    ours = answer(model, inputs, max_new_tokens=600)
    assert sessions == [599]
    assert torch.equal(ours, answer(model, inputs, theirs=True, max_new_tokens=600))


def test_a_given_cache_knows_the_answer(model: Any, sessions: list[int]) -> None:
    from transformers import DynamicCache

    inputs, cache = prompt(), DynamicCache(config=model.config)
    first = answer(model, inputs, past_key_values=cache, max_new_tokens=8)
    assert cache.get_seq_length() == 9 + 7 and sessions == [7]
    longer = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    rest = answer(model, longer, past_key_values=cache, max_new_tokens=6)
    assert torch.equal(rest[:, :17], first) and sessions == [7, 5]
    assert cache.get_seq_length() == 17 + 5


def test_what_the_loop_does_not_serve_goes_to_transformers(model: Any, sessions: list[int]) -> None:
    class Never(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    inputs = prompt()
    plain = answer(model, inputs)
    assert sessions == [19]
    assert torch.equal(answer(model, inputs, stopping_criteria=StoppingCriteriaList([Never()])), plain)
    assert answer(model, inputs, num_beams=2).shape == plain.shape
    assert torch.equal(answer(model, inputs, use_cache=False, max_new_tokens=1), plain[:, :10])
    assert sessions == [19]


def test_past_the_models_positions_transformers_loop_warns(model: Any, sessions: list[int]) -> None:
    inputs, positions = prompt(), int(model.config.max_position_embeddings)
    answer(model, inputs, max_new_tokens=positions - 9)
    assert sessions == [positions - 10]
    assert answer(model, inputs, max_new_tokens=positions).shape == (1, 9 + positions)
    assert sessions == [positions - 10]


def test_hooked_layers_are_called(model: Any, sessions: list[int]) -> None:
    inputs, calls = prompt(), []
    plain = answer(model, inputs)
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(answer(model, inputs)[:, :10], plain[:, :10])
    hook.remove()
    assert len(calls) == 20 and sessions == [19]


def test_whoever_watches_sees_every_pass(model: Any, sessions: list[int]) -> None:
    inputs, passes = prompt(), []
    plain = answer(model, inputs)
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(answer(model, inputs), plain)
    hook.remove()
    with model.gangline.observed(lambda *_: passes.append(2)):
        assert torch.equal(answer(model, inputs), plain)
    assert passes.count(1) == 20 and passes.count(2) >= 20
    assert sessions == [19]


def test_streams_of_two_threads_do_not_mix(model: Any) -> None:
    inputs = [prompt(), prompt()]
    expected = [answer(model, one) for one in inputs]
    found: list[Any] = [None, None]

    def run(i: int) -> None:
        found[i] = model.generate(
            **inputs[i], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_past_the_planned_context_is_refused(seed: int, tmp_path: Path) -> None:
    path = save_tiny("olmoe", tmp_path, seed=seed)
    loaded = gangline.load(path, memory="8GiB", ctx_size=32)
    assert loaded.gangline.plan.everything_resident
    assert answer(loaded, prompt(), max_new_tokens=20).shape == (1, 29)
    with pytest.raises(ContextError, match="ctx_size"):
        answer(loaded, prompt(), max_new_tokens=40)
    loaded.gangline.close()


def test_close_gives_generate_back(seed: int, tmp_path: Path) -> None:
    loaded = gangline.load(save_tiny("olmoe", tmp_path, seed=seed))
    assert "generate" in loaded.__dict__
    loaded.gangline.close()
    assert "generate" not in loaded.__dict__ and "forward" not in loaded.__dict__
