"""Random-weight checkpoints with the sizes of well-known MoE models, for measuring without a model hub.

Speed and memory depend on sizes and on routing, not on what the weights have learnt. There is no tokenizer,
and no token ends a text: benchmarks draw token ids at random and feed them, rather than let the model
choose (its choices soon repeat, and with them its routing). Routing is balanced (see
``random_checkpoint``), which is the worst case for any cache; for the other end, replay a trace with
locality (see ``replay``).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from gangline.benchmarks.random_checkpoint import Progress, write_random_checkpoint
from gangline.core.errors import UsageError
from gangline.core.home import cache_dir

logger = logging.getLogger(__name__)


def _decoder_layers(settings: dict[str, Any], layers: int) -> None:
    settings["num_hidden_layers"] = layers


def _encoder_decoder_layers(settings: dict[str, Any], layers: int) -> None:
    if layers % 2:
        raise UsageError(
            f"{layers} layers do not alternate dense and MoE; give an even number, for example {layers + 1}"
        )
    settings.update(num_layers=layers, num_decoder_layers=layers)
    settings.update(num_sparse_encoder_layers=layers // 2, num_sparse_decoder_layers=layers // 2)


@dataclass(frozen=True)
class Shape:
    """The sizes of one model.

    Attributes:
        model_type: transformers' name of the architecture.
        settings: what differs from the defaults of its config class.
        set_layers: writes another number of layers into the settings.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    set_layers: Callable[[dict[str, Any], int], None] = _decoder_layers

    def config(self, layers: int | None = None) -> PretrainedConfig:
        """Return the transformers config, cut to ``layers`` layers if given."""
        settings = dict(self.settings)
        if layers is not None:
            self.set_layers(settings, layers)
        return AutoConfig.for_model(self.model_type, **settings)


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_OLMOE = {
    "eos_token_id": None,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rope_parameters": _rope(10_000.0),
}
_QWEN3 = {
    "eos_token_id": None,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": _rope(1_000_000.0),
}
_MIXTRAL = {
    "eos_token_id": None,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_parameters": _rope(1_000_000.0),
}
_DEEPSEEK_V2_LITE = {
    "eos_token_id": None,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}
_SWITCH_BASE = {
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "num_experts": 128,
    "expert_capacity": 64,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}

# The tiny ones keep the number of experts and the top-k, so that routing behaves as in the large ones.
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
_TINY_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_TINY_SWITCH = {
    "d_model": 64,
    "d_ff": 32,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "vocab_size": 512,
}

SHAPES: dict[str, Shape] = {
    "olmoe-1b-7b": Shape("olmoe", _OLMOE),
    "qwen3-30b-a3b": Shape("qwen3_moe", _QWEN3),
    "mixtral-8x7b": Shape("mixtral", _MIXTRAL),
    "deepseek-v2-lite": Shape("deepseek_v2", _DEEPSEEK_V2_LITE),
    "switch-base-8": Shape("switch_transformers", _SWITCH_BASE | {"num_experts": 8}, _encoder_decoder_layers),
    "switch-base-64": Shape(
        "switch_transformers", _SWITCH_BASE | {"num_experts": 64}, _encoder_decoder_layers
    ),
    "switch-base-128": Shape("switch_transformers", _SWITCH_BASE, _encoder_decoder_layers),
    "tiny-olmoe": Shape("olmoe", _OLMOE | _TINY),
    "tiny-qwen3-moe": Shape("qwen3_moe", _QWEN3 | _TINY | {"moe_intermediate_size": 32, "head_dim": 16}),
    "tiny-mixtral": Shape("mixtral", _MIXTRAL | _TINY),
    "tiny-deepseek-v2": Shape(
        "deepseek_v2",
        _DEEPSEEK_V2_LITE | _TINY | _TINY_LATENT | {"moe_intermediate_size": 32, "num_key_value_heads": 4},
    ),
    "tiny-switch": Shape("switch_transformers", _SWITCH_BASE | _TINY_SWITCH, _encoder_decoder_layers),
}


def parse_shape(spec: str) -> tuple[Shape, int | None]:
    """Return the shape and the number of layers that ``name`` or ``name:layers`` names.

    Raises:
        UsageError: an unknown name, or layers that are not a whole number from 1 to the model's own.
    """
    name, colon, text = spec.partition(":")
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}; known shapes: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if not colon:
        return shape, None
    most = shape.config().num_hidden_layers
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise UsageError(f"shape {spec!r}: write a number of layers from 1 to {most} after the colon")
    return shape, int(text)


def shape_config(spec: str) -> PretrainedConfig:
    """Return the transformers config of ``spec``, for example ``qwen3-30b-a3b:4``."""
    shape, layers = parse_shape(spec)
    return shape.config(layers)


def make_shape(
    spec: str,
    folder: Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a random checkpoint that plain ``from_pretrained`` loads, and return its folder.

    A second call finds the finished shards and writes only those that are missing. Weights depend on the seed
    and on their names alone, so a resumed checkpoint equals one made in a single go.

    Args:
        spec: a name of ``SHAPES``, with ``:layers`` to cut it, for example ``qwen3-30b-a3b:4``.
        folder: where to write; by default ``shapes/SPEC`` in the cache folder.
        dtype: of all weights.
        seed: of the weights.
        progress: called with bytes done and bytes in all, first before anything is written.

    Raises:
        UsageError: an unknown shape, a folder that holds something else, or a disk without room.
    """
    config = shape_config(spec)
    if folder is None:
        folder = cache_dir("shapes", spec.replace(":", "-"))
    return write_random_checkpoint(config, folder, label=spec, dtype=dtype, seed=seed, progress=progress)
