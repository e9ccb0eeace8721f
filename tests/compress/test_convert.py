"""Conversion of a tiny Llama: exact where it must be, complete, atomic, and refusing by name."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gangline.compress.demo_artifact import pack_plan, unpack_plan
from gangline.compress.dense_to_moe import complete_folder, convert_dense, distill, fit_layers, load_dense
from gangline.compress.dense_to_moe.distill import DistillConfig
from gangline.compress.dense_to_moe.layer import FitConfig
from gangline.core.errors import CheckpointError, UnsupportedModelError, UsageError
from near_ties import share_off


def logits(folder, ids_BC) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids_BC).logits


@pytest.mark.parametrize("top_k", [1, 2])
def test_full_width_gives_the_dense_logits(tiny_llama, tmp_path, words, top_k):
    out = convert_dense(
        tiny_llama, tmp_path / "moe", text=words, experts=4, top_k=top_k, width=48 // top_k, length=32,
        dtype=torch.float32,
    )  # fmt: skip
    ids_BC = torch.randint(3, 128, (2, 40))
    assert share_off(logits(out, ids_BC), logits(tiny_llama, ids_BC)) < 5e-5


def test_folder_is_complete_and_stock(tiny_llama, tmp_path, words):
    out = convert_dense(tiny_llama, tmp_path / "moe", text=words, experts=4, length=32)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    assert model.config.intermediate_size == 18
    assert AutoTokenizer.from_pretrained(out)("w3 w4").input_ids == [6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_layers_are_fitted_on_the_converted_model(tiny_llama, words):
    """Refitted layers, one behind the other, come nearer to the dense model than unfitted ones."""
    model, tokenizer = load_dense(tiny_llama)
    ids_SC = torch.tensor(tokenizer(words).input_ids[:1920]).view(-1, 32)
    errors = []
    for rank in (0, None):
        plans = list(fit_layers(model, ids_SC, FitConfig(2, 24, 0, rank)))
        errors.append(student_error(model, plans, ids_SC))
    assert errors[1] < errors[0]


def student_error(model, plans, ids_SC) -> float:
    from gangline.compress.dense_to_moe.source import dense_ffn

    def grouped(plan, ffn):
        return lambda _, inputs, __: plan.output(ffn, inputs[0].flatten(0, 1)).view_as(inputs[0])

    layers = model.model.layers
    with torch.no_grad():
        dense_SCV = model(ids_SC).logits
        hooks = [
            layer.mlp.register_forward_hook(grouped(plan, dense_ffn(layer)))
            for layer, plan in zip(layers, plans, strict=True)
        ]
        grouped_SCV = model(ids_SC).logits
    for hook in hooks:
        hook.remove()
    return float((dense_SCV - grouped_SCV).square().mean())


def test_distillation_lowers_the_divergence(tiny_llama, words):
    model, tokenizer = load_dense(tiny_llama)
    ids_SC = torch.tensor(tokenizer(words).input_ids[:1920]).view(-1, 32)
    plans = list(fit_layers(model, ids_SC, FitConfig(2, 24, 4, 4)))
    losses = []
    learned = distill(
        model, plans, [ids_SC] * 40, DistillConfig(40, 0.1), on_step=lambda _, loss, __: losses.append(loss)
    )
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(new.neurons_GW, old.neurons_GW) for new, old in zip(learned, plans, strict=True))
    assert not torch.equal(learned[0].own.right, plans[0].own.right)


def test_distilled_module_computes_its_plan(tiny_llama, words):
    from gangline.compress.dense_to_moe.distill import GroupedFFN
    from gangline.compress.dense_to_moe.source import dense_ffn

    model, tokenizer = load_dense(tiny_llama)
    ids_SC = torch.tensor(tokenizer(words).input_ids[:960]).view(-1, 32)
    plan = next(iter(fit_layers(model, ids_SC, FitConfig(3, 24, 4, 4))))
    layer, x_TD = model.model.layers[0], torch.randn(50, 32)
    ffn = dense_ffn(layer)
    module = GroupedFFN(layer.mlp, plan)
    learned = module.learned()
    assert share_off(module(x_TD), learned.output(ffn, x_TD)) < 1e-5
    stored = unpack_plan(pack_plan(learned, 48))  # rounded already: storing changes nothing more
    # But the router's rows, which are stored in 16 bits: near a border they may choose another group.
    assert torch.equal(stored.router_GD, learned.router_GD.bfloat16().float())
    routed_alike = replace(learned, router_GD=stored.router_GD)
    assert share_off(stored.output(ffn, x_TD), routed_alike.output(ffn, x_TD)) < 1e-3
    assert (stored.route(x_TD) == learned.route(x_TD)).float().mean() > 0.8
    module.teacher = True
    assert share_off(module(x_TD), ffn.hidden(x_TD) @ ffn.down_DN.T) < 1e-5


def test_interrupted_conversion_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words_in_error"),
    [
        ({"experts": 5}, "multiple of top_k"),
        ({"width": 1000}, "the model has 48"),
        ({"text": "w1 w2"}, "Give more text"),
        ({"experts": 512, "tokens": 64}, "fewer experts"),
    ],
)
def test_sizes_that_do_not_fit(tiny_llama, tmp_path, words, options, words_in_error):
    with pytest.raises(UsageError, match=words_in_error):
        convert_dense(tiny_llama, tmp_path / "moe", **({"text": words, "length": 32} | options))
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_touched(tiny_llama, tmp_path, words):
    (tmp_path / "note").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        convert_dense(tiny_llama, tmp_path, text=words)
    assert (tmp_path / "note").read_text() == "keep"


def test_missing_source(tmp_path, words):
    with pytest.raises(CheckpointError, match="nowhere"):
        convert_dense(tmp_path / "nowhere", tmp_path / "moe", text=words)


def test_model_with_biases_is_refused(tmp_path, tokenizer, words):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        mlp_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    tokenizer.save_pretrained(tmp_path / "biased")
    with pytest.raises(UnsupportedModelError, match="biases"):
        convert_dense(tmp_path / "biased", tmp_path / "moe", text=words)
