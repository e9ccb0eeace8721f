"""Tiny random models of every MoE family in transformers, built from their own config classes.

``tiny_model("mixtral", seed=0)`` gives a real transformers model of some ten thousand parameters;
``model(**tiny_inputs(model))`` runs it. Every parameter and buffer that routing reads is random, so that no
bias, scale or table is left at a value that hides it.
"""

import importlib
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 96
EXPERTS = 8

# Values for every key that a config class knows under that name; a family's own entry below wins.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "dense_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "router_scaling_factor": 1.7,
    "route_scale": 1.7,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "num_nextn_predict_layers": 0,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projector_hidden_size": 32,
    "projection_hidden_dim": 32,
    "num_position_embeddings": 16,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "init_std": 0.3,
    "position_embedding_size": 16,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
}

_MLA = {"num_key_value_heads": 4}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_VISION = {"num_key_value_heads": 4, "num_hidden_layers": 1}

# What a family needs beside the common values. A nested dict belongs to the sub-config of that name.
_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {
        **_MLA,
        **_SPARSE,
        "layer_group_size": 2,
        "moe_renormalize": True,
        "linear_conv_kernel_dim": 4,
    },
    "beam": _SPARSE,
    "cohere2_moe": {},
    "deepseek_ocr2": {"text_config": _SPARSE},
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 4, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "diffusion_gemma": {"canvas_length": 12, "text_config": {"top_k_experts": 3}},
    "dots1": {},
    "dots3_note": {
        "text_config": {**_MLA, **_SPARSE, "head_dim": 16, "per_layer_config": {}},
        "vision_config": {
            **_VISION,
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["sparse"],
            "per_layer_config": {},
        },
        "audio_config": {**_VISION, "adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 16],
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        }
    },
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4": {"text_config": {"top_k_experts": 3, "enable_moe_block": True}},
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            }
        }
    },
    "glm5_next": {
        "text_config": {
            **_MLA,
            **_SPARSE,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "index_kpool": 2,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "indexer_types": None,
        }
    },
    "glm_moe_dsa": _MLA,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling": {**_SPARSE, "n_shared_experts": 2},
    "inkling2": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {**_MLA, **_SPARSE, **_LINEAR_AND_FULL},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "mistral4": {
        **_MLA,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral_large4": {"text_config": _MLA},
    "mixtral": {},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 16},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [4, 4, 4, 4]},
    },
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    "olmoe": {},
    "openai_privacy_filter": {},
    "phimoe": {"num_experts_per_tok": 2, "router_jitter_noise": 0.3},
    "qwen2_moe": {},
    "qwen3_5_moe": {"text_config": _LINEAR_AND_FULL},
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_AND_FULL,
    "qwen3_omni_moe": {
        "vision_start_token_id": 3,
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "output_dim": 32,
            "downsample_hidden_size": 4,
            "num_mel_bins": 16,
        },
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "qwen4_exp": {
        "text_config": {
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    "solar_open": {},
    "unlimited_ocr": {},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": 3},
    },
    "jetmoe": {"kv_channels": 8, "num_attention_heads": 6},
    "llama4": {
        "text_config": {
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 8,
        }
    },
    "longcat_flash": {
        **_MLA,
        "num_layers": 2,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 4,
    },
    "nllb_moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "router_bias": True,
        "router_ignore_padding_tokens": False,
    },
    "step3p7": {"text_config": {**_SPARSE, "swiglu_limits": [0.0, 0.5, 0.7]}},
    "switch_transformers": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 3,
        "initializer_factor": 2.0,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

FAMILIES: list[str] = sorted(_FAMILIES)

_CONFIG_NAMES = {"nllb_moe": "nllb-moe"}

# Where the mappings below name no class, or one whose other towers need more than text.
_CLASSES = {"inkling": "InklingForCausalLM", "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}

_HEADS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


def tiny_config(family: str) -> PretrainedConfig:
    """Return the family's own config with tiny sizes."""
    config_class = _model_class(family).config_class
    return config_class(**_shrink(config_class().to_dict(), _FAMILIES[family]))


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a random model of ``family`` in eval mode, every weight drawn from ``seed``."""
    config = tiny_config(family)
    torch.manual_seed(seed)
    model = _model_class(family)(config).to(dtype).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def tiny_inputs(
    model: PreTrainedModel, tokens: int = 12, batch: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return keyword arguments of one text-only forward pass."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = getattr(model.config, "canvas_length", tokens // 2 if model.config.is_encoder_decoder else None)
    if length is not None:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return inputs


def _shrink(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    small = {key: value for key, value in _COMMON.items() if key in defaults}
    for key, value in defaults.items():
        if _is_config(value):
            small[key] = _shrink(value, own.get(key, {})) | {"model_type": value["model_type"]}
    return small | {key: value for key, value in own.items() if not _is_config(defaults.get(key))}


def _is_config(value: object) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _model_class(family: str) -> type[PreTrainedModel]:
    config_name = _CONFIG_NAMES.get(family, family)
    name = _CLASSES.get(family) or next(names[config_name] for names in _HEADS if config_name in names)
    return getattr(importlib.import_module("transformers"), name)


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw what transformers starts at a constant: selection biases, scales, token tables, some routers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        leaf = name.rpartition(".")[2]
        if leaf == "tid2eid":
            rows = [
                torch.randperm(EXPERTS, generator=generator)[: tensor.shape[1]]
                for _ in range(tensor.shape[0])
            ]
            tensor.data.copy_(torch.stack(rows))
        elif leaf in ("e_score_correction_bias", "expert_bias"):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        elif leaf == "balancing_biases":  # larger ones send every token of a layer past its experts
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        elif tensor.dim() > 1 and tensor.is_floating_point() and not bool(tensor.any()):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif leaf in ("per_expert_scale", "global_scale"):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
