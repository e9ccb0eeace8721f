"""Installing our forward: the experts interface, and the adapters' special cases."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gangline.models import expert_math, find_moe, install, resident_forward
from models.rig import logits, resident
from near_ties import agree_unless_tied, is_tied, share_off
from tiny_models import tiny_inputs, tiny_model


def zeros(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return torch.zeros_like(x_TD)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_former_implementation_comes_back(implementation: str, seed: int) -> None:
    model = tiny_model("olmoe", seed)
    model.set_experts_implementation(implementation)
    undos = [install(block, zeros) for block in find_moe(model).blocks]
    assert model.get_experts_implementation() == {"": "gangline"}
    for undo in undos[:-1]:
        undo()
    assert model.get_experts_implementation() == {"": "gangline"}
    undos[-1]()
    assert model.get_experts_implementation() == {"": implementation}


def test_blocks_without_our_forward_keep_computing_themselves(seed: int) -> None:
    model = tiny_model("qwen3_moe", seed)
    plain = logits(model)
    view = find_moe(model)

    def attempt(draw: int) -> Callable[[], bool] | None:
        undo = install(view.blocks[1], resident_forward(view.blocks[1]))
        ours = logits(model, draw)
        undo()
        if share_off(ours, logits(model, draw)) < 5e-5:
            return None
        return lambda: is_tied(model, lambda: logits(model, draw), lambda a, b: not share_off(a, b) < 2e-4)

    agree_unless_tied(attempt)
    undo = install(view.blocks[1], zeros)
    assert share_off(logits(model), plain) > 1e-2
    undo()
    assert torch.equal(logits(model), plain)


def test_installing_twice_is_undone_step_by_step(seed: int) -> None:
    model = tiny_model("mixtral", seed)
    block = find_moe(model).blocks[0]
    plain = logits(model)
    first = install(block, resident_forward(block))
    ours = logits(model)
    second = install(block, zeros)
    assert not torch.equal(logits(model), ours)
    second()
    assert torch.equal(logits(model), ours)
    first()
    assert torch.equal(logits(model), plain)


def test_another_model_of_the_same_family_is_not_touched(seed: int) -> None:
    model = tiny_model("mixtral", seed)
    other = copy.deepcopy(model)
    plain = logits(other)
    undos = [install(block, zeros) for block in find_moe(model).blocks]
    assert torch.equal(logits(other), plain)
    for undo in undos:
        undo()


def test_generation_uses_our_forward(seed: int) -> None:
    model = tiny_model("mixtral", seed)

    def attempt(draw: int) -> Callable[[], bool] | None:
        inputs = tiny_inputs(model, tokens=5, seed=draw)

        def generate() -> Tensor:
            return model.generate(
                **inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
            )

        with resident(find_moe(model)) as calls:
            ours = generate()
        assert {len(x_TD) for _, x_TD, _, _ in calls} == {2 * 5, 2}
        if torch.equal(ours, generate()):
            return None
        return lambda: is_tied(model, generate, lambda a, b: not torch.equal(a, b))

    agree_unless_tied(attempt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_models_dtype(dtype: torch.dtype, seed: int) -> None:
    model = tiny_model("gpt_oss", seed, dtype)
    block = find_moe(model).blocks[0]
    x_TD, ids_TK = torch.randn(16, 32, dtype=dtype), torch.randint(8, (16, 2))
    weights_TK = torch.rand(16, 2, dtype=dtype)
    with torch.no_grad():
        plain_TD = block.experts(x_TD, ids_TK, weights_TK)
        undo = install(block, lambda x, ids, weights: resident_forward(block)(x, ids, weights).double())
        ours_TD = block.experts(x_TD, ids_TK, weights_TK)
    undo()
    assert ours_TD.dtype == dtype
    torch.testing.assert_close(ours_TD, plain_TD, rtol=0, atol=0.05 * float(plain_TD.abs().max()))


def test_longcat_fetches_nothing_for_identity_experts(seed: int) -> None:
    model = tiny_model("longcat_flash", seed)
    with resident(find_moe(model)) as calls:
        logits(model)
    skipped = [ids_TK == 8 for _, _, ids_TK, _ in calls]
    assert any(bool(mask.any()) for mask in skipped)
    for mask, (_, _, _, weights_TK) in zip(skipped, calls, strict=True):
        assert bool((weights_TK[mask] == 0).all()) and bool((weights_TK[~mask] != 0).all())


def test_llama4_runs_only_the_chosen_experts(seed: int) -> None:
    model = tiny_model("llama4", seed)
    with resident(find_moe(model)) as calls:
        logits(model, batch=2, tokens=12)
    assert all(ids_TK.shape == (2 * 12 * 3, 1) for _, _, ids_TK, _ in calls)


def test_switch_leaves_out_tokens_beyond_capacity(seed: int) -> None:
    model = tiny_model("switch_transformers", seed)
    view = find_moe(model)
    with resident(view) as calls:
        logits(model, batch=2, tokens=24)
    assert view.blocks[0].router_spec.capacity == 3
    assert any(bool((ids_TK == 8).any()) for _, _, ids_TK, _ in calls)
    for _, _, ids_TK, _ in calls:
        for sequence in ids_TK.view(2, -1):
            assert int(torch.bincount(sequence, minlength=9)[:8].max()) <= 3


def test_nllb_says_which_experts_the_installed_transformers_runs(seed: int) -> None:
    model = tiny_model("nllb_moe", seed)
    view = find_moe(model)
    with resident(view) as calls:
        logits(model)
    only_two = all(int(ids_TK.max()) <= 1 for _, _, ids_TK, _ in calls)
    assert only_two == any("only experts 0 and 1" in note for note in view.notes)


def test_nllb_by_its_paper_computes_the_chosen_experts(seed: int) -> None:
    """Without the note the adapter gives what the architecture says: the sum over the two chosen experts."""
    view = find_moe(tiny_model("nllb_moe", seed))
    block = view.blocks[0]
    block.notes = ()
    x_TD = torch.randn(16, block.geometry.hidden)
    mask_TE, weights_TE, _ = block.router(x_TD)
    dropout = block.experts.moe_token_dropout
    expected_TD = sum(
        block.experts[f"expert_{e}"](x_TD) * weights_TE[:, e : e + 1] * (1 - dropout) for e in range(8)
    )
    undo = install(block, resident_forward(block))
    with torch.no_grad():
        ours_TD = block.experts(x_TD, mask_TE, weights_TE)
    undo()
    assert int((weights_TE > 0).sum(1).max()) == 2
    assert share_off(ours_TD, expected_TD.detach()) < 1e-5


def test_jetmoe_attention_stays_dense(seed: int) -> None:
    view = find_moe(tiny_model("jetmoe", seed))
    assert [block.name for block in view.blocks] == [f"model.layers.{i}.mlp" for i in range(3)]


def test_tied_experts_are_named(seed: int) -> None:
    view = find_moe(tiny_model("diffusion_gemma", seed))
    assert [block.same_weights_as for block in view.blocks] == [None, None, None, 0, 1, 2]


def test_clamped_gates_differ_from_layer_to_layer(seed: int) -> None:
    first, second = (expert_math(block) for block in find_moe(tiny_model("step3p7", seed)).blocks)
    gate_up = torch.full((1, 48), 4.0)
    assert float(first.apply_gate(gate_up).max()) == pytest.approx(0.25)
    assert float(second.apply_gate(gate_up).max()) == pytest.approx(0.49)


def test_two_expert_sets_per_layer_are_two_blocks(seed: int) -> None:
    view = find_moe(tiny_model("ernie4_5_vl_moe", seed))
    names = [block.name.split("mlp.")[1] for block in view.blocks]
    assert names == ["text_moe.experts", "vision_moe.experts"] * 2
    assert [block.geometry.intermediate for block in view.blocks] == [24, 16] * 2
    assert all(len(block.shared) == 1 for block in view.blocks)
