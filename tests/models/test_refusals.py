"""What gangline does not understand is refused by name."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM

from gangline.core.errors import ConformanceError, UnsupportedModelError
from gangline.kernels.reference import ExpertMath
from gangline.models import MoEView, check_conformance, drop_expert_params, find_moe
from models.rig import on_meta
from tiny_models import tiny_model

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def test_a_dense_model_is_told_so() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no MoE layer.*gangline convert"):
        find_moe(LlamaForCausalLM(LlamaConfig(**SMALL)))


def test_product_key_experts_are_refused_by_class() -> None:
    model = DogeForCausalLM(DogeConfig(**SMALL, is_moe=True, num_experts=16, num_experts_per_tok=2))
    with pytest.raises(UnsupportedModelError, match="DogeCDMoE"):
        find_moe(model)


def test_unknown_experts_beside_known_ones_are_refused(seed: int) -> None:
    class StrangeExperts(nn.Module):
        num_experts = 4

    model = tiny_model("mixtral", seed)
    model.model.layers[0].self_attn.extra = StrangeExperts()
    with pytest.raises(UnsupportedModelError, match=r"StrangeExperts \(model.layers.0.self_attn.extra\)"):
        find_moe(model)


def test_a_class_named_after_experts_is_not_taken_for_dense() -> None:
    class HomeMadeMoELayer(nn.Module):
        pass

    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.model.layers[0].mlp = HomeMadeMoELayer()
    with pytest.raises(UnsupportedModelError, match="HomeMadeMoELayer"):
        find_moe(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantized_experts_are_refused(seed: int, dtype: torch.dtype) -> None:
    model = tiny_model("olmoe", seed)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"OlmoeExperts\.down_proj holds quantized weights"):
        find_moe(model)


def test_a_model_without_its_experts_is_refused(seed: int) -> None:
    model = tiny_model("qwen3_moe", seed)
    drop_expert_params(find_moe(model).blocks[0])
    with pytest.raises(UnsupportedModelError, match=r"Qwen3MoeExperts has no parameter gate_up_proj.*detach"):
        find_moe(model)


def test_conformance_needs_real_routers(seed: int) -> None:
    view = find_moe(on_meta(tiny_model("mixtral", seed)))
    with pytest.raises(ConformanceError, match="meta device"):
        check_conformance(view)


def test_a_router_with_another_output_order_is_refused(seed: int) -> None:
    model = tiny_model("granitemoe", seed)
    for layer in model.model.layers:
        router = layer.block_sparse_moe.router
        stock = type(router).forward

        class Reordered(type(router)):  # type: ignore[misc]
            def forward(self, x_TD, stock=stock):
                logits_TE, weights_TK, ids_TK = stock(self, x_TD)
                return ids_TK, weights_TK, logits_TE

        Reordered.__name__ = type(router).__name__
        router.__class__ = Reordered
    with pytest.raises(ConformanceError, match="does not return"):
        check_conformance(find_moe(model))


def test_conformance_passes_over_dropped_experts_and_unknown_routers(seed: int) -> None:
    view = find_moe(tiny_model("olmoe", seed))
    for block in view.blocks:
        drop_expert_params(block)
    view.blocks[0].router_spec = None
    check_conformance(view)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "switch_transformers", "dbrx"])
def test_wrong_expert_arithmetic_is_refused(family: str, seed: int) -> None:
    view = find_moe(tiny_model(family, seed))
    block = view.blocks[-1]

    class Wrong(type(block.adapter)):  # type: ignore[misc]
        def math(self, block) -> ExpertMath:
            right = super().math(block)
            return replace(right, apply_gate=lambda gate_up: right.apply_gate(gate_up) * 1.01)

    with pytest.raises(ConformanceError, match=f"{type(block.experts).__name__} computes something else"):
        check_conformance(MoEView(view.model, view.family, [replace(block, adapter=Wrong())]))


def test_a_router_class_that_is_not_in_the_table_runs_without_a_rule(seed: int) -> None:
    model = tiny_model("mixtral", seed)
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = type("HomeMadeRouter", (type(layer.mlp.gate),), {})
    view = find_moe(model)
    assert all(block.router_spec is None for block in view.blocks)
    assert "HomeMadeRouter" in view.blocks[0].router_reason
    check_conformance(view)
