"""Prompts through the native step: the same bits in whatever pieces, and what the modules compute."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gangline.kernels.cpu import native
from gangline.runtime.native_cache import GrowingLayer
from native_rig import ALSO, DEMANDED, RowByRow, build, feed, same
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import VOCABULARY

pytestmark = pytest.mark.skipif(native() is None, reason="the native core is not built")


def prompt(batch: int, tokens: int, padding: int) -> tuple[Tensor, Tensor]:
    """Tokens and a mask; the first sequence is padded on the left."""
    ids_BP = torch.randint(3, VOCABULARY, (batch, tokens))
    mask_BP = torch.ones_like(ids_BP)
    mask_BP[0, :padding] = 0
    return ids_BP, mask_BP


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    core: Any = native()
    before = core.threads()
    yield core.set_threads
    core.set_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", DEMANDED + ALSO)
def test_same_bits_whole_in_pieces_and_token_by_token(
    family: str, dtype: torch.dtype, seed: int, threads: Callable[[int], None]
) -> None:
    model, step = build(family, seed, dtype)
    ids_BP, mask_BP = prompt(2, 23, 4)
    threads(2)
    whole = feed(model, ids_BP, mask_BP, [23])
    assert (step.prompts, step.steps) == (1, 0)
    pieces = feed(model, ids_BP, mask_BP, [9, 1, 11, 2])
    assert (step.prompts, step.steps) == (4, 1)
    threads(1)
    single = feed(model, ids_BP, mask_BP, [1] * 23)
    assert (step.prompts, step.steps) == (5, 23)
    assert same(whole, pieces, [4, 0]) and same(whole, single, [4, 0])
    assert torch.equal(pieces.logits[0], single.logits[8])


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_same_bits_across_chunks_of_the_cache(family: str, seed: int) -> None:
    model, step = build(family, seed, torch.bfloat16)
    ids_BP, mask_BP = prompt(2, 530, 270)
    whole = feed(model, ids_BP, mask_BP, [530])
    pieces = feed(model, ids_BP, mask_BP, [250, 30, 1, 249])
    step.decoder.native.set_block_rows(48)  # rows of both sequences in one block of them
    blocks = feed(model, ids_BP, mask_BP, [530])
    assert same(whole, pieces, [270, 0]) and same(whole, blocks, [270, 0])
    last = feed(model, ids_BP, mask_BP, [528, 1, 1])
    assert same(whole, last, [270, 0])


def test_a_sequence_does_not_depend_on_those_beside_it(seed: int) -> None:
    model, _ = build("qwen3_moe", seed)
    ids_BP, mask_BP = prompt(3, 40, 7)
    together = feed(model, ids_BP, mask_BP, [40])
    alone = feed(model, ids_BP[:1], mask_BP[:1], [40])
    bare = feed(model, ids_BP[:1, 7:], mask_BP[:1, 7:], [33])
    assert torch.equal(together.logits[0][:1], alone.logits[0]) and torch.equal(
        alone.logits[0], bare.logits[0]
    )


@pytest.mark.parametrize("family", DEMANDED + ALSO)
def test_says_what_the_modules_say(family: str, seed: int) -> None:
    model, step = build(family, seed)

    @torch.no_grad()
    def attempt(draw: int) -> Callable[[], bool] | None:
        ids_BP, mask_BP = prompt(3, 19, 5)
        step.enabled = True
        ours = feed(model, ids_BP, mask_BP, [19]).logits[0]
        step.enabled = False

        def again() -> Tensor:
            return feed(model, ids_BP, mask_BP, [19]).logits[0]

        if share_off(ours, again()) < 1e-4:
            return None
        return torch.no_grad()(lambda: is_tied(model, again, lambda a, b: not share_off(a, b) < 4e-4))

    agree_unless_tied(attempt)


def test_routing_of_a_prompt_is_that_of_its_tokens(seed: int) -> None:
    model, step = build("qwen2_moe", seed)
    moe: Any = step._moe
    ids_BP, mask_BP = prompt(2, 12, 0)
    feed(model, ids_BP, mask_BP, [12])
    whole, moe.events = moe.events, []
    feed(model, ids_BP, mask_BP, [1] * 12)
    layers = 1 + max(layer for layer, _ in whole)
    for layer, ids_TK in whole:
        single = torch.stack([ids_BK for number, ids_BK in moe.events if number == layer], 1)
        assert torch.equal(ids_TK, single.flatten(0, 1))
    assert len(whole) == layers and len(moe.events) == 12 * layers


ASKED: dict[str, dict[str, Any]] = {
    "logits of all positions": {"logits_to_keep": 0},
    "logits of two positions": {"logits_to_keep": 2},
    "no cache": {"use_cache": False},
    "hidden states": {"output_hidden_states": True},
    "a tuple": {"return_dict": False},
    "a mask with a hole": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])},
    "padding on the right": {"attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])},
    "a mask of its own": {"attention_mask": torch.zeros(2, 1, 5, 5)},
}


@pytest.mark.parametrize("what", ASKED)
def test_leaves_to_the_modules(what: str, seed: int) -> None:
    model, step = build("qwen2_moe", seed)
    ids_BP, asked = torch.randint(3, VOCABULARY, (2, 5)), {"logits_to_keep": 1} | ASKED[what]
    with torch.no_grad():
        ours = model(ids_BP, **asked)
        step.enabled = False
        theirs = model(ids_BP, **asked)
    assert step.prompts == 0
    assert torch.equal(ours[0], theirs[0])


def test_leaves_prompts_to_the_modules_unless_told(seed: int) -> None:
    model, step = build("olmoe", seed)
    step.serves_prompts = False
    ids_BP, mask_BP = prompt(2, 9, 2)
    mine = feed(model, ids_BP, mask_BP, [6, 2, 1])
    step.enabled = False
    theirs = feed(model, ids_BP[:, :6], mask_BP[:, :6], [6])
    assert (step.prompts, step.steps) == (0, 1)
    assert torch.equal(mine.logits[0], theirs.logits[0])


def test_steps_aside_for_hooked_and_moved_parts(seed: int) -> None:
    model, step = build("mixtral", seed)
    ids_BP, mask_BP = prompt(2, 9, 2)
    fed = feed(model, ids_BP, mask_BP, [9])
    seen: list[int] = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    feed(model, ids_BP, mask_BP, [9])
    with torch.no_grad():  # also where the cache is one of ours
        model(
            ids_BP,
            attention_mask=torch.cat([mask_BP, mask_BP], 1),
            past_key_values=fed.cache,
            logits_to_keep=1,
        )
    hook.remove()
    assert step.prompts == 1 and len(seen) == 2
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    feed(model, ids_BP, mask_BP, [9])
    assert step.prompts == 1


def test_goes_on_from_a_cache_that_the_modules_began(seed: int) -> None:
    model, step = build("olmoe", seed)

    @torch.no_grad()
    def attempt(draw: int) -> Callable[[], bool] | None:
        ids_BP, mask_BP = prompt(2, 14, 3)
        step.enabled, before = True, step.prompts
        cache = model(ids_BP[:, :8], attention_mask=mask_BP[:, :8], use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        more = {"attention_mask": mask_BP, "logits_to_keep": 1}
        ours = model(ids_BP[:, 8:], past_key_values=cache, **more).logits
        assert step.prompts - before == 1
        step.enabled = False

        def again() -> Tensor:
            return model(ids_BP[:, 8:], past_key_values=copy.deepcopy(twin), **more).logits

        if share_off(ours, again()) < 1e-4:
            return None
        return torch.no_grad()(lambda: is_tied(model, again, lambda a, b: not share_off(a, b) < 4e-4))

    agree_unless_tied(attempt)


def test_error_in_the_experts_leaves_the_cache_as_it_was(seed: int) -> None:
    model, step = build("olmoe", seed)
    ids_BP, mask_BP = prompt(1, 9, 0)
    cache = DynamicCache(config=model.config)
    working, moe = RowByRow.forward, step._moe
    calls: list[int] = []

    def failing(layer: int, *rest: Any) -> Tensor:
        calls.append(layer)
        if len(calls) == 2:
            raise ZeroDivisionError
        return working(moe, layer, *rest)  # type: ignore[arg-type]

    moe.forward = failing  # type: ignore[method-assign]
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(ids_BP, past_key_values=cache, logits_to_keep=1)
        assert cache.get_seq_length() == 0
        again = model(ids_BP, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    assert torch.equal(again, feed(model, ids_BP, mask_BP, [9]).logits[0])
    assert all(isinstance(layer, GrowingLayer) for layer in cache.layers)
