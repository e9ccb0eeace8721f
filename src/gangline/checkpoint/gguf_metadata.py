"""The key-value header of a GGUF file, from a transformers config."""

from typing import Any

from gangline.checkpoint.gguf_names import Family
from gangline.core.errors import UnsupportedModelError

_QUANTIZATION_VERSION = 2


def check_computable(config: Any, family: Family) -> None:
    """Refuse a model whose config asks for something that llama.cpp's architecture does not compute.

    Raises:
        UnsupportedModelError: names the option.
    """
    wrong = {
        "hidden_act": getattr(config, "hidden_act", "silu") != "silu",
        "clip_qkv": getattr(config, "clip_qkv", None) is not None,
        "norm_topk_prob": getattr(config, "norm_topk_prob", family.renormalised) != family.renormalised,
        "decoder_sparse_step": getattr(config, "decoder_sparse_step", 1) != 1,
        "mlp_only_layers": bool(getattr(config, "mlp_only_layers", None)),
        # llama.cpp expects the norms of queries and of keys to be of one size.
        "num_key_value_heads": family.arch == "olmoe"
        and config.num_key_value_heads != config.num_attention_heads,
        "sliding_window": bool(getattr(config, "sliding_window", None)),
        "rope_parameters": config.rope_parameters.get("rope_type", "default")
        not in ("default", "linear", "yarn"),
    }
    for option, refused in wrong.items():
        if refused:
            raise UnsupportedModelError(
                f"llama.cpp's {family.arch} architecture cannot compute {config.model_type} with "
                f"{option} = {getattr(config, option)!r}; this model cannot become a GGUF file"
            )


def add_metadata(writer: Any, config: Any, family: Family, name: str, file_type: int) -> None:
    """Write sizes, attention, rotary and router facts of ``config`` into a ``gguf.GGUFWriter``."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(context)
