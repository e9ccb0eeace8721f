"""The last layer of a prompt, of which the logits need each sequence's last token only.

Shape suffixes: B sequences, P positions, T rows, K chosen experts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import gangline
from gangline.kernels.cpu import native
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.models import expert_math, find_moe, stored_fields
from gangline.runtime.native_decode import NativeDecode, enable_native_decode
from native_rig import DEMANDED, NativeExperts, feed, same
from tiny_models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(native() is None, reason="the native core is not built")


def resident(family: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, NativeDecode, Any]:
    """A tiny model whose step computes the experts too, and who is told of them."""
    model = tiny_model(family, seed=seed, dtype=dtype)
    view = find_moe(model)
    if any(NativeKernel.supports(stored_fields(b, dtype), expert_math(b)) for b in view.blocks):
        pytest.skip("its experts are stored transposed")
    experts: Any = NativeExperts(view, dtype)
    step = enable_native_decode(model, view, experts)
    assert step is not None
    step.serves_prompts = True
    step.decoder.set_experts(experts.table())
    return model, step, experts


def prompt(batch: int, tokens: int, padding: int) -> tuple[Tensor, Tensor]:
    ids_BP = torch.randint(3, VOCABULARY, (batch, tokens))
    mask_BP = torch.ones_like(ids_BP)
    mask_BP[0, :padding] = 0
    return ids_BP, mask_BP


def routed(experts: Any) -> list[Tensor]:
    """Ids of every layer of the passes since the last call."""
    events, experts.events = experts.events, []
    return [ids_TK for _, ids_TK in events]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*DEMANDED, "gpt_oss", "glm4_moe", "dots1"])
def test_same_bits_with_and_without_the_other_tokens(family: str, dtype: torch.dtype, seed: int) -> None:
    model, step, experts = resident(family, seed, dtype)
    ids_BP, mask_BP = prompt(3, 23, 4)
    fed, seen = [], []
    for guided, pieces in ((True, [23]), (False, [23]), (False, [9, 1, 11, 2])):
        experts.guided = guided
        fed.append(feed(model, ids_BP, mask_BP, pieces))
        seen.append(routed(experts))
    assert step.prompts == 5 and step.steps == 1
    assert same(fed[0], fed[1], [4, 0, 0]) and same(fed[0], fed[2], [4, 0, 0])
    everything, last = seen[0], seen[1]
    assert len(everything) == len(last)
    assert all(torch.equal(a, b) for a, b in zip(everything[:-1], last[:-1], strict=True))
    assert len(everything[-1]) == 69 and torch.equal(everything[-1][22::23], last[-1])


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_across_chunks_and_blocks_of_rows(family: str, seed: int) -> None:
    model, step, experts = resident(family, seed, torch.bfloat16)
    ids_BP, mask_BP = prompt(2, 530, 270)
    experts.guided = True
    everything = feed(model, ids_BP, mask_BP, [530])
    experts.guided = False
    assert same(everything, feed(model, ids_BP, mask_BP, [530]), [270, 0])
    step.decoder.native.set_block_rows(48)  # rows of both sequences in one block of them
    assert same(everything, feed(model, ids_BP, mask_BP, [250, 280]), [270, 0])


def test_a_dense_layer_at_the_end(seed: int, tmp_path: Path) -> None:
    settings = tiny_model("qwen3_moe", seed=seed).config.to_dict()
    last = settings["num_hidden_layers"] - 1
    config = Qwen3MoeConfig.from_dict(settings | {"mlp_only_layers": [last]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids_BP, mask_BP = prompt(2, 21, 5)
    with gangline.load(tmp_path, precision="int8").gangline as runtime:
        assert len(runtime.geometry.layers) == last
        whole = feed(runtime._model, ids_BP, mask_BP, [21])
        assert same(whole, feed(runtime._model, ids_BP, mask_BP, [1] * 21), [5, 0])


def test_who_watches_sees_every_token(seed: int, tmp_path: Path) -> None:
    tiny_model("olmoe", seed=seed).save_pretrained(tmp_path)
    ids_BP, mask_BP = prompt(2, 21, 0)
    counted = [0]
    with gangline.load(tmp_path, precision="int4").gangline as runtime:
        layers = len(runtime.geometry.layers)
        seen: list[Tensor] = []
        unwatched = feed(runtime._model, ids_BP, mask_BP, [21])
        counted.append(runtime.stats().host_hits)
        with runtime.observed(lambda _layer, _x, ids_TK, _w: seen.append(ids_TK.clone())):
            watched = feed(runtime._model, ids_BP, mask_BP, [21])
        counted.append(runtime.stats().host_hits)
    assert same(unwatched, watched, [0, 0])
    assert [len(ids_TK) for ids_TK in seen] == [42] * layers
    computed = [len(ids_TK.unique()) for ids_TK in seen]
    assert counted[2] - counted[1] == sum(computed)
    assert counted[1] == sum(computed[:-1]) + len(seen[-1][20::21].unique())
