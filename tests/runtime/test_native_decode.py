"""The native decode step against transformers' own modules, and when it steps aside."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from gangline.formats import get_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.formats.samoyeds_arrays import prune_magnitude
from gangline.kernels.cpu import native
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.cpu.packed_linear import PackedLinear
from gangline.models import expert_math, find_moe, stored_fields
from gangline.runtime.native_cache import GrowingLayer
from gangline.runtime.native_decode import NativeDecode, enable_native_decode
from native_rig import ModuleExperts, NativeExperts
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import VOCABULARY, tiny_model

pytestmark = pytest.mark.skipif(native() is None, reason="the native core is not built")

DEMANDED = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
ALSO = ["dots1", "glm4_moe", "gpt_oss", "hy_v3", "minimax_m2", "solar_open"]


def build(
    family: str, seed: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Any, NativeDecode]:
    model = tiny_model(family, seed=seed, dtype=dtype)
    view = find_moe(model)
    step = enable_native_decode(model, view, ModuleExperts(view), **options)
    assert step is not None
    return model, step


def prompt(batch: int = 2, tokens: int = 9, padding: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(**inputs, **(settings | options))  # type: ignore[operator]


def difference(ours: Any, theirs: Any) -> float:
    a, b = torch.stack(list(ours)).float(), torch.stack(list(theirs)).float()
    return float((a - b).norm() / b.norm())


def unlike(ours: Any, theirs: Any, tolerance: float = 4e-4) -> bool:
    """Whether two answers differ in a token, or in their logits by more than noise alone makes them."""
    same = torch.equal(ours.sequences, theirs.sequences)
    return not (same and difference(ours.logits, theirs.logits) < tolerance)


def says_otherwise(
    model: PreTrainedModel, ours: Any, again: Callable[[], Any], tolerance: float = 1e-4
) -> Callable[[], bool] | None:
    """For ``agree_unless_tied``: nothing if the modules, asked ``again``, say what we said."""
    if not unlike(ours, again(), tolerance):
        return None
    return lambda: is_tied(model, again, unlike)


@pytest.fixture
def two_threads() -> Iterator[Callable[[int], None]]:
    core: Any = native()
    before = core.threads()
    core.set_threads(2)
    yield core.set_threads
    core.set_threads(before)


@pytest.mark.parametrize("family", DEMANDED + ALSO)
def test_generates_what_the_modules_generate(family: str, seed: int) -> None:
    model, step = build(family, seed)

    def attempt(draw: int) -> Callable[[], bool] | None:
        inputs = prompt(batch=3)
        step.enabled, before = True, step.steps
        ours = generate(model, inputs)
        assert step.steps - before == 23
        step.enabled = False
        return says_otherwise(model, ours, lambda: generate(model, inputs))

    agree_unless_tied(attempt)


def encode_pruned(weight_OI: torch.Tensor, name: str) -> torch.Tensor:
    """Bytes of a matrix, pruned first where the codec wants a pattern of zeros."""
    codec = get_codec(name)
    return codec.encode(
        prune_magnitude(weight_OI, codec.pattern) if isinstance(codec, SparseCodec) else weight_OI
    )


@pytest.mark.parametrize(
    "codec",
    ["tile16:int8g32", "tile16:int4g64z", "samoyeds16:1:2:32/int8g64", "samoyeds16:1:1:32/bf16"],
)
@pytest.mark.parametrize("family", [*DEMANDED, "glm4_moe", "gpt_oss"])
def test_packed_dense_weights(family: str, codec: str, seed: int) -> None:
    model = tiny_model(family, seed=seed)
    linears = {
        n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and "shared_expert_gate" not in n
    }
    for name, linear in linears.items():
        raw = encode_pruned(linear.weight.detach(), codec)
        packed = PackedLinear(raw, codec, linear.in_features, linear.out_features, linear.bias)
        model.set_submodule(name, packed)
    view = find_moe(model)
    step = enable_native_decode(model, view, ModuleExperts(view))
    assert step is not None
    # Now and then an activation lies on the border between two of its int8 steps, and what follows may tip a
    # router: of many rows only few.
    inputs = prompt(batch=12, tokens=5, padding=2)
    ours = generate(model, inputs, max_new_tokens=3)
    assert step.steps == 2
    step.enabled = False
    theirs = generate(model, inputs, max_new_tokens=3)
    rows = [difference([a], [b]) for a, b in zip(ours.logits[1], theirs.logits[1], strict=True)]
    assert sum(row < 5e-2 for row in rows) >= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", DEMANDED)
def test_one_step_in_sixteen_bits_is_near_the_modules(family: str, dtype: torch.dtype, seed: int) -> None:
    model, step = build(family, seed, dtype)
    inputs = prompt(batch=12)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        more = {
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(12, 1, dtype=torch.int64)], 1)
        }
        token = torch.randint(3, VOCABULARY, (12, 1))
        ours = model(token, past_key_values=cache, **more).logits
        step.enabled = False
        theirs = model(token, past_key_values=twin, **more).logits
    assert step.steps == 1 and ours.dtype == dtype and ours.shape == theirs.shape
    # A near-tie in a router may send a row of a random model elsewhere: of many rows only few.
    rows = [difference([a], [b]) for a, b in zip(ours, theirs, strict=True)]
    assert sum(row < 0.1 for row in rows) >= 8
    assert difference([cache.layers[0].keys], [twin.layers[0].keys]) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*DEMANDED, "gpt_oss", "glm4_moe"])
def test_experts_outside_and_inside_the_step_give_the_same_bits(
    family: str, dtype: torch.dtype, seed: int
) -> None:
    model = tiny_model(family, seed=seed, dtype=dtype)
    view = find_moe(model)
    if any(NativeKernel.supports(stored_fields(b, dtype), expert_math(b)) for b in view.blocks):
        pytest.skip("its experts are stored transposed")
    experts = NativeExperts(view, dtype)
    step = enable_native_decode(model, view, experts)
    assert step is not None
    inputs = prompt(batch=3)
    outside = generate(model, inputs)
    outside_events, experts.events = experts.events, []
    step.decoder.set_experts(experts.table())
    assert step.decoder.resident
    inside = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(outside.logits, inside.logits, strict=True))
    assert [layer for layer, _ in outside_events] == [layer for layer, _ in experts.events]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(outside_events, experts.events, strict=True))
    step.decoder.set_experts(None)
    assert not step.decoder.resident


def test_result_does_not_depend_on_threads_or_on_the_batch(
    seed: int, two_threads: Callable[[int], None]
) -> None:
    model = tiny_model("olmoe", seed=seed)
    view = find_moe(model)
    assert enable_native_decode(model, view, NativeExperts(view, torch.float32)) is not None
    inputs = prompt(batch=3, tokens=300, padding=37)
    together = generate(model, inputs, max_new_tokens=4)
    two_threads(1)
    alone = generate(model, inputs, max_new_tokens=4)
    assert all(torch.equal(a, b) for a, b in zip(together.logits, alone.logits, strict=True))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        single = copy.deepcopy(cache)
        single.batch_select_indices(torch.tensor([0]))
        token = torch.randint(3, VOCABULARY, (3, 1))
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
        three = model(token, past_key_values=cache, attention_mask=mask).logits
        one = model(token[:1], past_key_values=single, attention_mask=mask[:1]).logits
    assert torch.equal(three[:1], one)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_long_context_of_several_chunks(family: str, seed: int) -> None:
    model, step = build(family, seed)

    def attempt(draw: int) -> Callable[[], bool] | None:
        inputs = prompt(batch=2, tokens=601, padding=299)
        step.enabled, before = True, step.steps
        ours = generate(model, inputs, max_new_tokens=3)
        assert step.steps - before == 2
        step.enabled = False
        return says_otherwise(model, ours, lambda: generate(model, inputs, max_new_tokens=3))

    agree_unless_tied(attempt)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_beam_search(family: str, seed: int) -> None:
    model, step = build(family, seed)
    options = {"num_beams": 3, "max_new_tokens": 12, "num_return_sequences": 2}

    def attempt(draw: int) -> Callable[[], bool] | None:
        inputs = prompt()
        step.enabled, before = True, step.steps
        ours = generate(model, inputs, **options)
        assert step.steps - before >= 11
        step.enabled = False

        def again() -> Any:
            return generate(model, inputs, **options).sequences

        if torch.equal(ours.sequences, again()):
            return None
        return lambda: is_tied(model, again, lambda a, b: not torch.equal(a, b))

    agree_unless_tied(attempt)


def test_prompt_in_chunks_and_a_cache_that_goes_on(seed: int) -> None:
    model, step = build("qwen2_moe", seed)
    model.generation_config.prefill_chunk_size = 4

    def attempt(draw: int) -> Callable[[], bool] | None:
        step.enabled, before = True, step.steps
        first = generate(model, prompt(padding=0), max_new_tokens=6)
        ids = torch.cat([first.sequences, torch.randint(3, VOCABULARY, (2, 4))], 1)
        # The first answer may hold the padding token, which a mask made from the ids would leave out.
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ours = generate(model, more, past_key_values=first.past_key_values, max_new_tokens=8)
        assert step.steps - before == (1 + 5) + (1 + 7)  # the last chunk of both prompts is one token
        step.enabled = False
        return says_otherwise(model, ours, lambda: generate(model, more, max_new_tokens=8))

    agree_unless_tied(attempt)


def test_positions_of_the_caller_count(seed: int) -> None:
    model, step = build("olmoe", seed)
    positions = torch.tensor([[1, 2, 3, 10, 11], [0, 1, 2, 3, 4]])
    new = torch.tensor([[30], [5]])

    @torch.no_grad()
    def attempt(draw: int) -> Callable[[], bool] | None:
        ids, token = torch.randint(3, VOCABULARY, (2, 5)), torch.randint(3, VOCABULARY, (2, 1))
        step.enabled, before = True, step.steps
        cache = model(ids, position_ids=positions, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        ours = model(token, position_ids=new, past_key_values=cache, logits_to_keep=1).logits
        assert step.steps - before == 1
        step.enabled = False

        def again() -> Tensor:
            return model(token, position_ids=new, past_key_values=copy.deepcopy(twin)).logits

        if share_off(ours, again()) < 1e-4:
            return None
        return torch.no_grad()(lambda: is_tied(model, again, lambda a, b: not share_off(a, b) < 4e-4))

    agree_unless_tied(attempt)


FALLBACKS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "router logits": {"output_router_logits": True},
    "a tuple": {"return_dict": False},
    "a loss": {"labels": torch.tensor([[4], [5]])},
    "a mask with a hole": {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])},
    "a mask of its own": {"attention_mask": torch.zeros(2, 1, 1, 6)},
    "several positions": {"logits_to_keep": torch.tensor([0])},
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_falls_back_to_the_modules_for(what: str, seed: int) -> None:
    model, step = build("qwen2_moe", seed)
    ids, token = torch.randint(3, VOCABULARY, (2, 5)), torch.randint(3, VOCABULARY, (2, 1))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        ours = model(token, past_key_values=cache, **FALLBACKS[what])
        step.enabled = False
        theirs = model(token, past_key_values=twin, **FALLBACKS[what])
    assert step.steps == 0
    pick = (lambda out: out[0]) if what == "a tuple" else (lambda out: out.logits)
    assert torch.equal(pick(ours), pick(theirs))


def test_falls_back_for_gradients_embeddings_and_other_caches(seed: int) -> None:
    model, step = build("qwen2_moe", seed)
    ids, token = torch.randint(3, VOCABULARY, (2, 5)), torch.randint(3, VOCABULARY, (2, 1))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    model(token, past_key_values=copy.deepcopy(cache)).logits.sum().backward()
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(token), past_key_values=copy.deepcopy(cache))
        model(token, past_key_values=copy.deepcopy(cache), use_cache=False)
        static = StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=static)
        model(token, past_key_values=static)
        foreign = DynamicCache(config=model.config)
        step.enabled = False
        model(ids, past_key_values=foreign)
        step.enabled = True
        model(token, past_key_values=foreign)
        model.train()
        model(token, past_key_values=copy.deepcopy(cache))
    assert step.steps == 0


def test_steps_aside_when_parts_are_hooked_or_replaced(seed: int) -> None:
    model, step = build("mixtral", seed)
    inputs = prompt()
    seen: list[int] = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: seen.append(1))
    generate(model, inputs, max_new_tokens=4)
    assert step.steps == 0 and len(seen) == 4
    hook.remove()
    generate(model, inputs, max_new_tokens=4, output_hidden_states=True)
    assert step.steps == 0
    generate(model, inputs, max_new_tokens=4)  # transformers leaves its capturing hooks behind
    assert step.steps == 3
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    ours = generate(model, inputs, max_new_tokens=4)
    step.close()
    assert step.steps == 3 and "forward" not in model.__dict__
    assert torch.equal(ours.logits[-1], generate(model, inputs, max_new_tokens=4).logits[-1])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("deepseek_v3", "kv_a_layernorm"), ("phimoe", "sparsemixer"), ("qwen3_next", "linear_attn")],
)
def test_refuses_by_name(family: str, reason: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family, seed=seed)
    view = find_moe(model)
    with caplog.at_level(logging.INFO, logger="gangline"):
        assert enable_native_decode(model, view, ModuleExperts(view)) is None
    assert reason in caplog.text and len(caplog.records) == 1
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("part", ["mlp", "self_attn", "norm", "gate"])
def test_refuses_modules_that_compute_something_else(
    part: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("qwen2_moe", seed=seed)
    view = find_moe(model)
    layer = model.model.layers[1]
    module = {
        "mlp": layer.mlp,
        "self_attn": layer.self_attn,
        "norm": model.model.norm,
        "gate": layer.mlp.gate,
    }[part]
    original = module.forward

    def altered(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if part == "gate":
            return out[0], out[1] * 1.2, out[2]
        return (out[0] * 1.2, *out[1:]) if isinstance(out, tuple) else out * 1.2

    module.forward = altered
    with caplog.at_level(logging.INFO, logger="gangline"):
        assert enable_native_decode(model, view, ModuleExperts(view)) is None
    assert "decodes through transformers' modules" in caplog.text


def test_cache_grows_in_steps_up_to_the_planned_context(seed: int) -> None:
    model, step = build("olmoe", seed, context=600)
    inputs = prompt(batch=2, tokens=255, padding=0)
    out = generate(model, inputs, max_new_tokens=10)
    capacities = {layer.native_rows()[2] for layer in out.past_key_values.layers}
    assert capacities == {300} and step.steps == 9
    assert out.past_key_values.get_seq_length() == 255 + 9
    assert all(isinstance(layer, GrowingLayer) for layer in out.past_key_values.layers)


def test_error_in_the_experts_leaves_the_cache_as_it_was(seed: int) -> None:
    model, step = build("olmoe", seed)
    ids, token = torch.randint(3, VOCABULARY, (1, 5)), torch.randint(3, VOCABULARY, (1, 1))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        working = step._moe.forward
        step._moe.forward = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(token, past_key_values=cache)
        assert cache.get_seq_length() == 5
        step._moe.forward = working
        ours = model(token, past_key_values=cache).logits
        fresh = model(ids, use_cache=True).past_key_values
        theirs = model(token, past_key_values=fresh).logits
    assert torch.equal(ours, theirs)
