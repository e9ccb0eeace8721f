"""Tiny random MoE models for the GGUF tests, files written from them by the gguf package, and the way back.

The names of tensors come from the gguf package's own table, so that they check ours.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gangline.checkpoint.gguf import GGUFCheckpoint
from gangline.checkpoint.gguf_plain import plain_tensors
from gangline.checkpoint.source import ExpertsModule

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MLA = {
    "n_routed_experts": 8,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {"model_type": "olmoe", "num_key_value_heads": 4, "num_experts": 8, "intermediate_size": 32},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "intermediate_size": 96,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "head_dim": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        **_MLA,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "rope_parameters": _YARN,
    },
    "deepseek_v3": {
        **_MLA,
        "model_type": "deepseek_v3",
        "q_lora_rank": 32,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_mtp_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 8,
        "intermediate_size": 64,
        "head_dim": 32,
        "sliding_window": 8,
        "rope_parameters": _GPT_OSS_ROPE,
    },
}
WRITABLE = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")
FOREIGN = ("deepseek_v2", "deepseek_v3", "gpt_oss")
_ARCH = {
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a random fp32 model whose routers choose clearly; draws from torch's global generator."""
    config = AutoConfig.for_model(**{**_COMMON, **CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("norm.weight", "layernorm.weight")):
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                tensor.normal_(0, 0.5 if name.endswith(("gate.weight", "router.weight")) else 0.15)
    return model


def experts_modules(model: PreTrainedModel) -> list[ExpertsModule]:
    """Describe the experts modules of a model."""
    return [
        ExpertsModule(
            prefix=name,
            experts=module.num_experts,
            params={part: tuple(getattr(module, part).shape) for part in ("gate_up_proj", "down_proj")},
            transposed=module.is_transposed,
            has_gate=module.has_gate,
            interleaved=not module.is_concatenated,
        )
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3
    ]


def expert_matrices(model: PreTrainedModel, prefix: str) -> dict[str, Tensor]:
    """Return ``gate``, ``up`` (E, F, D) and ``down`` (E, D, F) of one module, whatever its layout."""
    module = model.get_submodule(prefix)
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if module.is_concatenated:
        gate, up = gate_up.chunk(2, dim=1)
    else:
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    return {"gate": gate.contiguous(), "up": up.contiguous(), "down": down.contiguous()}


def rebuild(checkpoint: GGUFCheckpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a plain transformers model with every weight from the file."""
    model = AutoModelForCausalLM.from_config(checkpoint.config).to(dtype).eval()
    state = model.state_dict()
    filled = set()
    for name, tensor in plain_tensors(checkpoint, experts_modules(model), dtype):
        assert name in state
        assert name not in filled
        assert tensor.shape == state[name].shape, name
        state[name].copy_(tensor)
        filled.add(name)
    model.tie_weights()
    assert set(state) - filled == ({"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set())
    return model


def gguf_names(model: PreTrainedModel, family: str) -> dict[str, str]:
    """Map every dense parameter to its GGUF name by the gguf package's table."""
    table = gguf.get_tensor_name_map(_ARCH[family], model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        if ".mlp.experts." in name:
            continue
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if name.endswith(".sinks"):
            known += ".weight"
        found = table.get_name(known, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        names[name] = found
    return names


def write_foreign(
    model: PreTrainedModel, path: Path, *, absorbed: bool = True, **writer_options: Any
) -> gguf.GGUFWriter:
    """Write a DeepSeek or gpt-oss model in fp32 the way in which llama.cpp's converter lays it out."""
    family, config = model.config.model_type, model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCH[family]], **writer_options)
    _common_metadata(writer, config)
    (_gpt_oss_metadata if family == "gpt_oss" else _deepseek_metadata)(writer, config, absorbed)
    state = model.state_dict()
    for name, theirs in gguf_names(model, family).items():
        if absorbed and name.endswith("kv_b_proj.weight"):
            kv = state[name].view(config.num_attention_heads, -1, config.kv_lora_rank)
            k_b, v_b = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            writer.add_tensor(theirs.replace("kv_b", "k_b"), k_b.transpose(1, 2).contiguous().numpy())
            writer.add_tensor(theirs.replace("kv_b", "v_b"), v_b.contiguous().numpy())
        else:
            writer.add_tensor(theirs, state[name].float().numpy())
    for module in experts_modules(model):
        block = f"blk.{module.prefix.split('.')[2]}"
        for part, matrices in expert_matrices(model, module.prefix).items():
            writer.add_tensor(f"{block}.ffn_{part}_exps.weight", matrices.numpy())
        if family == "gpt_oss":
            experts = model.get_submodule(module.prefix)
            both = experts.gate_up_proj_bias.detach().numpy()
            writer.add_tensor(f"{block}.ffn_gate_exps.bias", np.ascontiguousarray(both[:, ::2]))
            writer.add_tensor(f"{block}.ffn_up_exps.bias", np.ascontiguousarray(both[:, 1::2]))
            writer.add_tensor(f"{block}.ffn_down_exps.bias", experts.down_proj_bias.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer


def _common_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    experts = "num_local_experts" if config.model_type == "gpt_oss" else "n_routed_experts"
    writer.add_expert_count(getattr(config, experts))
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("none")
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _gpt_oss_metadata(writer: gguf.GGUFWriter, config: Any, absorbed: bool) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _deepseek_metadata(writer: gguf.GGUFWriter, config: Any, absorbed: bool) -> None:
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    writer.add_head_count_kv(1 if absorbed else config.num_attention_heads)
    if absorbed:
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_key_length(key)
        writer.add_value_length(config.v_head_dim)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.n_group > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    sigmoid = config.model_type == "deepseek_v3"
    kind = gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
    writer.add_expert_gating_func(kind)
