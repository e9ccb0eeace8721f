"""The plain transformers model and tokenizer of a checkpoint: what ours is compared with."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
from gangline.checkpoint.packed import is_packed
from gangline.core.errors import CheckpointError
from gangline.core.layout import ExpertLayout
from gangline.core.sizes import format_size
from gangline.formats import get_codec
from gangline.models import MoEBlock, find_moe, restore_expert_params
from gangline.runtime.dense import read_config
from gangline.runtime.opened import experts_modules, open_model

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
# Loading copies: the files' pages, the tensors, and a layer's experts being stacked (seen: 1.45 times the
# weights).
_ROOM = 1.5


def find_checkpoint(model: str | Path, revision: str | None = None) -> LocalCheckpoint:
    """Return the files of what :func:`gangline.load` accepts, ``"demo"`` too, downloading what is missing.

    Raises:
        CheckpointError: nothing of that name, or it cannot be read.
    """
    found = resolve_checkpoint(place(model), revision)
    if not isinstance(found, LocalCheckpoint):
        raise CheckpointError(f"{model} is not on this machine; check the network")
    return replace(found, name=str(model))


def place(model: str | Path) -> str | Path:
    """Return where a model is: for ``"demo"`` the folder, made on first use, else the name itself."""
    if model != "demo":
        return model
    from gangline.compress.demo import demo_made_apart

    return demo_made_apart()


def has_tokenizer_files(checkpoint: LocalCheckpoint) -> bool:
    """Whether a folder holds a file that tokenizers are made from; never so for a GGUF file."""
    folder = checkpoint.folder
    return checkpoint.gguf is None and any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(checkpoint: LocalCheckpoint) -> Any | None:
    """Return the tokenizer of a checkpoint, or None if it has none (random-weight checkpoints).

    Raises:
        CheckpointError: it has one that transformers cannot read.
        UnsupportedModelError: the tokenizer belongs to an architecture that transformers does not know.
    """
    from transformers import AutoTokenizer

    if checkpoint.gguf is not None:
        from gangline.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint.open(checkpoint.gguf).tokenizer()
    # Of a configuration that it cannot read, AutoTokenizer makes a nameless one with a warning.
    read_config(checkpoint.folder, checkpoint.name)
    if not has_tokenizer_files(checkpoint):
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint.name}: transformers cannot read its tokenizer ({reason}); "
            "put a tokenizer.json beside the weights"
        ) from error


def load_plain(checkpoint: LocalCheckpoint, kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return the model as transformers itself computes it, wholly in memory.

    Args:
        checkpoint: its files.
        kind: model class, for example that of our own loaded model.
        config: its configuration (needed for GGUF files, whose weights we decode).
        dtype: of all weights.
    """
    if checkpoint.gguf is None and is_packed(checkpoint.folder):
        return _dense_twin(checkpoint, dtype)
    if checkpoint.gguf is None:
        return kind.from_pretrained(checkpoint.folder, dtype=dtype).eval()
    from gangline.checkpoint.gguf import GGUFCheckpoint
    from gangline.checkpoint.gguf_plain import plain_tensors

    model = kind._from_config(config, dtype=dtype).eval()
    state = model.state_dict()
    modules = experts_modules(find_moe(model))
    for name, tensor in plain_tensors(GGUFCheckpoint.open(checkpoint.gguf), modules, dtype):
        state[name].copy_(tensor)
    return model


def _dense_twin(checkpoint: LocalCheckpoint, dtype: torch.dtype) -> Any:
    """The transformers model that has the packed experts of our own checkpoints as plain matrices."""
    opened = open_model(checkpoint, dtype)
    model, view = opened.load_dense(None)
    for block, layout in zip(view.blocks, opened.source.layouts, strict=True):
        experts = opened.source.read_layer(block.layer)
        restore_expert_params(block, (_plain_fields(block, layout, raws, dtype) for _, raws in experts))
    return model.eval()


def _plain_fields(
    block: MoEBlock, layout: ExpertLayout, raws: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """One expert's matrices in the order, the halves and the direction of its module."""
    weights = {
        spec.name: get_codec(spec.codec).decode(raw, spec.shape, dtype)
        for spec, raw in zip(layout.fields, raws, strict=True)
    }
    if "gate" in weights and any(field.name == "gate_up" for field in block.fields):
        weights["gate_up"] = torch.cat([weights.pop("gate"), weights.pop("up")])
    return tuple(
        weights[field.name].t() if field.transposed else weights[field.name] for field in block.fields
    )


def no_room_for_plain(kind: Any, config: Any, dtype: torch.dtype) -> str | None:
    """Return why the plain model cannot be loaded beside this process, or None if it can.

    Args:
        kind: model class.
        config: its configuration.
        dtype: of all weights.
    """
    import psutil

    with torch.device("meta"):
        parameters = kind._from_config(config).num_parameters()
    needed = int(parameters * dtype.itemsize * _ROOM)
    available = psutil.virtual_memory().available
    if needed <= available:
        return None
    return f"needs {format_size(needed)} of memory, {format_size(available)} available"
