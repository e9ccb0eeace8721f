"""The dense model of a conversion: which architectures fit, and its parts."""

from pathlib import Path
from typing import Any

import torch

from gangline.compress.dense_to_moe.layer import DenseFFN
from gangline.core.errors import CheckpointError, UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def load_dense(source: str | Path) -> tuple[Any, Any]:
    """Load a dense Llama-like model in float32 with its tokenizer.

    Args:
        source: local folder, hub id, or a GGUF file.

    Raises:
        CheckpointError: nothing loadable there.
        UnsupportedModelError: not a bias-free SwiGLU Llama or Mistral model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    where: tuple[str, dict[str, str]] = (str(source), {})
    if path.suffix == ".gguf":
        where = (str(path.parent), {"gguf_file": path.name})
    try:
        tokenizer = AutoTokenizer.from_pretrained(where[0], **where[1])
        model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no dense model could be loaded ({error}). "
            "Give a folder, hub id or GGUF file of a Llama model."
        ) from error
    check_dense(model)
    return model.eval(), tokenizer


def check_dense(model: Any) -> None:
    """Refuse models whose FFN or attention the Mixtral architecture cannot express."""
    config, name = model.config, type(model).__name__
    if name not in ARCHITECTURES:
        problem = f"is a {name}, not one of {', '.join(ARCHITECTURES)}"
    elif getattr(config, "mlp_bias", False) or getattr(config, "attention_bias", False):
        problem = "has biases in its attention or FFN"
    elif config.hidden_act != "silu":
        problem = f"uses {config.hidden_act}, not SwiGLU"
    else:
        return
    raise UnsupportedModelError(
        f"{getattr(config, 'name_or_path', None) or name}: {problem}; it cannot be written as Mixtral. "
        "Convert a bias-free SwiGLU Llama or Mistral model."
    )


def dense_ffn(layer: Any) -> DenseFFN:
    """The FFN of one decoder layer, in float32, without copying where it already is."""
    mlp = layer.mlp
    gate, up, down = (part.weight.detach().float() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return DenseFFN(gate, up, down)
