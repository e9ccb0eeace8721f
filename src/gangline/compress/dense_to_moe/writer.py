"""Write a converted model as a stock Mixtral checkpoint: complete folder, or nothing."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gangline.compress.dense_to_moe.layer import DenseFFN, LayerPlan
from gangline.compress.dense_to_moe.source import dense_ffn

LAYERS_PER_SHARD = 5
KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
    "initializer_range",
)


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`: becomes `out` when the block ends well, vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mixtral_config(dense: Any, experts: int, top_k: int, width: int) -> Any:
    """The Mixtral configuration that keeps everything of the dense one but the FFN."""
    from transformers import MixtralConfig

    values = {name: getattr(dense, name) for name in KEPT if hasattr(dense, name)}
    window = getattr(dense, "sliding_window", None)
    config = MixtralConfig(
        **values,
        sliding_window=window,
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    config.architectures = ["MixtralForCausalLM"]
    return config


def layer_tensors(prefix: str, layer: Any, ffn: DenseFFN, plan: LayerPlan, top_k: int) -> dict[str, Tensor]:
    """All tensors of one decoder layer under their Mixtral names."""
    tensors = {
        f"{prefix}.{name}": value.detach()
        for name, value in layer.named_parameters()
        if not name.startswith("mlp.")
    }
    moe, rows = f"{prefix}.block_sparse_moe", []
    for expert, (row_D, weights) in enumerate(plan.experts(ffn, top_k)):
        rows.append(row_D)
        tensors[f"{moe}.experts.{expert}.w1.weight"] = weights.gate_ND
        tensors[f"{moe}.experts.{expert}.w3.weight"] = weights.up_ND
        tensors[f"{moe}.experts.{expert}.w2.weight"] = weights.down_DN
    tensors[f"{moe}.gate.weight"] = torch.stack(rows)
    return tensors


def write_mixtral(
    model: Any,
    tokenizer: Any,
    plans: Iterator[LayerPlan],
    folder: Path,
    *,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
    on_layer: Callable[[], object] = lambda: None,
) -> None:
    """Write config, tokenizer and sharded safetensors into `folder`, taking `plans` one layer at a time."""
    shards: list[tuple[str, list[str]]] = []
    size, experts, width = 0, 0, 0

    def save(tensors: dict[str, Tensor]) -> None:
        nonlocal size
        stored = {name: value.to(dtype).contiguous().clone() for name, value in tensors.items()}
        shards.append((f"part-{len(shards):03d}.safetensors", list(stored)))
        save_file(stored, folder / shards[-1][0], metadata={"format": "pt"})
        size += sum(value.nbytes for value in stored.values())

    outside = {
        "model.embed_tokens.weight": model.model.embed_tokens.weight,
        "model.norm.weight": model.model.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        outside["lm_head.weight"] = model.lm_head.weight
    save({name: value.detach() for name, value in outside.items()})
    pending: dict[str, Tensor] = {}
    for index, (layer, plan) in enumerate(zip(model.model.layers, plans, strict=True)):
        experts, width = len(plan.neurons_GW) * top_k, plan.neurons_GW.shape[1] // top_k
        pending |= layer_tensors(f"model.layers.{index}", layer, dense_ffn(layer), plan, top_k)
        if (index + 1) % LAYERS_PER_SHARD == 0:
            save(pending)
            pending = {}
        on_layer()
    if pending:
        save(pending)
    _write_index(folder, shards, size)
    config = mixtral_config(model.config, experts, top_k, width)
    config.dtype = dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_index(folder: Path, shards: list[tuple[str, list[str]]], size: int) -> None:
    """Give the shards their usual names and write the index."""
    weight_map: dict[str, str] = {}
    for number, (name, tensors) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / name).rename(folder / final)
        weight_map |= dict.fromkeys(tensors, final)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
