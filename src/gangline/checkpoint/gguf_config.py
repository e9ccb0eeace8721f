"""A transformers config from the metadata of a GGUF file.

GGUF stores 32-bit floats: ``1e-5`` comes back as ``9.99999974e-06``. Printing it at 32-bit precision gives
the number that was meant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gangline.checkpoint.gguf_header import GGUFTensor, Value
from gangline.checkpoint.gguf_names import FAMILIES, Family
from gangline.core.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LARGEST = 1 << 24  # no size of a model in tokens, layers, experts or channels comes near
_SIGMOID = 2  # expert_gating_func: 0 or absent means softmax for all of these architectures
_LOG_MULTIPLIER = 0.1  # llama.cpp stores YaRN's mscale_all_dim times this


@dataclass(frozen=True)
class Metadata:
    """Typed access to the metadata of one architecture; a wrong type or an absurd number is a clear error.

    Attributes:
        path: the file, for errors.
        arch: prefix of the keys.
        values: all key-value pairs.
    """

    path: Path
    arch: str
    values: Mapping[str, Value]

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a size; ``default`` if the key is absent, else :class:`CheckpointError`."""
        value = self._first(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value < _LARGEST:
            raise self._wrong(key, value)
        return value

    def either(self, key: str, other: str) -> int:
        """Return the size under ``key``, or else under ``other``."""
        return self.integer(key if self.has(key) else other)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite positive number at the precision with which GGUF stores it."""
        value = self._first(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < float(value) < 1e30:  # type: ignore[arg-type]
            raise self._wrong(key, value)
        return float(str(np.float32(value)))  # type: ignore[arg-type]

    def boolean(self, key: str, default: bool) -> bool:
        """Return a flag."""
        value = self._first(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._wrong(key, value)
        return value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self._first(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value)
        return value

    def token(self, name: str) -> int | None:
        """Return a special token's id, or ``None`` if the file names none."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < _LARGEST else None

    def has(self, key: str) -> bool:
        """Whether the architecture's key is there."""
        return f"{self.arch}.{key}" in self.values

    def _first(self, key: str) -> Value | None:
        """The value, or the one value that a per-layer array repeats."""
        value = self.values.get(f"{self.arch}.{key}")
        if isinstance(value, tuple) and len(set(value)) == 1:
            return value[0]
        return value

    def _wrong(self, key: str, value: object) -> CheckpointError:
        what = "lacks" if value is None else f"has an impossible value ({repr(value)[:40]}) for"
        return CheckpointError(f"{self.path}: the file {what} {self.arch}.{key}; convert the model again")


def family_of(path: Path, values: Mapping[str, Value]) -> Family:
    """Return the family of a file.

    Raises:
        UnsupportedModelError: the architecture is not among ours, or is ``llama`` without experts.
    """
    arch = values.get("general.architecture")
    if not isinstance(arch, str):
        raise CheckpointError(f"{path}: the file names no architecture; convert the model again")
    if arch not in FAMILIES:
        raise UnsupportedModelError(
            f"{path}: cannot read the GGUF architecture {arch!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    if not values.get(f"{arch}.expert_count"):
        raise UnsupportedModelError(f"{path}: this {arch} model has no experts; gangline runs MoE models")
    return FAMILIES[arch]


def make_config(metadata: Metadata, family: Family, tensors: Mapping[str, GGUFTensor]) -> "PreTrainedConfig":
    """Return the transformers config of a GGUF file.

    Raises:
        CheckpointError: a size is missing or impossible.
        UnsupportedModelError: transformers cannot compute what the metadata asks for.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings = {**_common(metadata, tensors), **_BUILDERS[family.arch](metadata, tensors)}
    norm = metadata.boolean("expert_weights_norm", bool(family.renormalised))
    if family.renormalised is not None and norm != family.renormalised:
        raise UnsupportedModelError(
            f"{metadata.path}: llama.cpp's {family.arch} ignores expert_weights_norm = {norm}; "
            "use safetensors"
        )
    try:
        return AutoConfig.for_model(**settings)
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{metadata.path}: the metadata contradict each other ({reason}); convert the model again"
        ) from error


def _common(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    embedding = tensors.get("token_embd.weight")
    hidden = metadata.integer("embedding_length")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise CheckpointError(
            f"{metadata.path}: token_embd.weight is missing or not of shape (vocabulary, {hidden}); "
            "convert the model again"
        )
    # Layers that predict further tokens come last; the plain model goes without them.
    layers = metadata.integer("block_count") - metadata.integer("nextn_predict_layers", 0, least=0)
    if not 0 < layers <= len(tensors):
        raise CheckpointError(
            f"{metadata.path}: {layers} layers cannot have {len(tensors)} tensors; convert the model again"
        )
    heads = metadata.integer("attention.head_count")
    pad = metadata.token("padding")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "rope_parameters": _rope(metadata),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.token("bos"),
        "eos_token_id": metadata.token("eos"),
        "pad_token_id": pad if pad is None or pad < embedding.shape[0] else None,
    }


def _rope(metadata: Metadata) -> dict[str, Any]:
    theta = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.text("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{metadata.path}: rotary scaling {kind!r} is not supported; linear and yarn are"
        )
    rope: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": theta,
        "factor": metadata.number("rope.scaling.factor"),
    }
    if kind == "yarn":
        rope["original_max_position_embeddings"] = metadata.integer("rope.scaling.original_context_length")
        if metadata.has("rope.scaling.yarn_log_multiplier"):
            scale = round(metadata.number("rope.scaling.yarn_log_multiplier") / _LOG_MULTIPLIER, 6)
            rope |= {"mscale": scale, "mscale_all_dim": scale}
    return rope


def _olmoe(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_experts": metadata.integer("expert_count"),
        "norm_topk_prob": False,
    }


def _mixtral(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_local_experts": metadata.integer("expert_count"),
        "head_dim": _head_dim(metadata),
        "sliding_window": None,
    }


def _qwen(metadata: Metadata, model_type: str) -> dict[str, Any]:
    used = metadata.integer("expert_used_count")
    dense = metadata.integer("feed_forward_length")
    return {
        "model_type": model_type,
        "intermediate_size": dense,
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length", max(1, dense // used)),
        "num_experts": metadata.integer("expert_count"),
    }


def _qwen2moe(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    shared = metadata.either("expert_shared_feed_forward_length", "feed_forward_length")
    return {
        **_qwen(metadata, "qwen2_moe"),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
    }


def _qwen3moe(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    return {**_qwen(metadata, "qwen3_moe"), "head_dim": _head_dim(metadata), "norm_topk_prob": True}


def _gpt_oss(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    rope = _rope(metadata)
    if rope["rope_type"] == "yarn":
        # The architecture's own constants: GGUF has no key for the last one.
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {
        "model_type": "gpt_oss",
        "intermediate_size": metadata.either("expert_feed_forward_length", "feed_forward_length"),
        "num_local_experts": metadata.integer("expert_count"),
        "head_dim": _head_dim(metadata),
        "sliding_window": metadata.integer("attention.sliding_window", 128),
        "rope_parameters": rope,
    }


def _deepseek2(metadata: Metadata, tensors: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    rope_dim = metadata.integer("rope.dimension_count")
    key = metadata.either("attention.key_length_mla", "attention.key_length")
    if key <= rope_dim:
        raise CheckpointError(
            f"{metadata.path}: keys of {key} channels cannot hold {rope_dim} rotary ones; "
            "convert the model again"
        )
    gating = metadata.integer("expert_gating_func", 0, least=0)
    groups = metadata.integer("expert_group_count", 1, least=0) or 1
    norm = metadata.boolean("expert_weights_norm", False)
    settings = {
        "model_type": "deepseek_v3" if gating == _SIGMOID else "deepseek_v2",
        # Absorbed attention is stored as one key-value head; transformers counts the heads before absorption.
        "num_key_value_heads": metadata.integer("attention.head_count"),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "n_routed_experts": metadata.integer("expert_count"),
        "n_shared_experts": metadata.integer("expert_shared_count"),
        "first_k_dense_replace": metadata.integer("leading_dense_block_count", 0, least=0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0),
        "norm_topk_prob": norm,
        "q_lora_rank": metadata.integer("attention.q_lora_rank") if _has_q_lora(tensors) else None,
        "kv_lora_rank": metadata.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": metadata.either("attention.value_length_mla", "attention.value_length"),
        "n_group": groups,
        "topk_group": metadata.integer("expert_group_used_count", 1, least=0) or 1,
    }
    if gating == _SIGMOID:
        return {**settings, "num_mtp_layers": 0}
    if norm:
        raise UnsupportedModelError(
            f"{metadata.path}: transformers' deepseek_v2 does not renormalise softmax weights; "
            "use safetensors"
        )
    return {**settings, "topk_method": "group_limited_greedy" if groups > 1 else "greedy"}


def _has_q_lora(tensors: Mapping[str, GGUFTensor]) -> bool:
    return "blk.0.attn_q_a.weight" in tensors


def _head_dim(metadata: Metadata) -> int:
    heads = metadata.integer("attention.head_count")
    return metadata.integer("attention.key_length", max(1, metadata.integer("embedding_length") // heads))


_BUILDERS: dict[str, Callable[[Metadata, Mapping[str, GGUFTensor]], dict[str, Any]]] = {
    "olmoe": _olmoe,
    "llama": _mixtral,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
}
