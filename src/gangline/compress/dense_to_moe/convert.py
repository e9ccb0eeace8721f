"""Dense to MoE for any Llama-like model, on the user's own text."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gangline.compress.dense_to_moe.layer import FitConfig
from gangline.compress.dense_to_moe.progress import layer_bar
from gangline.compress.dense_to_moe.source import load_dense
from gangline.compress.dense_to_moe.stream import fit_layers
from gangline.compress.dense_to_moe.writer import complete_folder, write_mixtral
from gangline.core.errors import UsageError

log = logging.getLogger("gangline.compress.dense_to_moe")


def cut_sequences(ids: Sequence[int], length: int, tokens: int) -> Tensor:
    """Sequences [S, C] spread evenly over a text, about `tokens` tokens in all."""
    available = len(ids) // length
    wanted = max(1, min(available, tokens // length))
    starts = [int(i * available / wanted) * length for i in range(wanted)]
    return torch.tensor([list(ids[start : start + length]) for start in starts])


def convert_dense(
    source: str | Path,
    out: str | Path,
    *,
    text: str,
    experts: int = 16,
    top_k: int = 2,
    width: int | None = None,
    tokens: int = 32768,
    length: int = 512,
    refit: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> Path:
    """Convert a dense model into a Mixtral-architecture MoE without training.

    Per layer: spherical k-means of the FFN inputs into `experts / top_k` groups, each group keeps the neurons
    with the most output energy on its tokens, and its down projection is refitted by ridge regression on
    the converted model's own inputs. After Read-ME (arXiv 2410.19123: experts are the neurons that matter to
    a kind of text) and MoEfication (arXiv 2110.01786: clusters within one FFN); unlike both, the clusters are
    of tokens and per layer, experts may share neurons, the router is linear and nothing is trained.

    Args:
        source: folder, hub id or GGUF file of a bias-free Llama or Mistral model.
        out: folder to make; it must not exist.
        text: text of the kind that the model will see; at least `length` tokens.
        width: neurons per expert; three quarters of the FFN over `top_k` when None.
        tokens: how much of the text to calibrate on.
        refit: False keeps the dense weights as they are.
        dtype: storage type of the written weights.

    Returns:
        `out`, a complete folder that plain transformers loads. An interrupted run leaves nothing behind.

    Raises:
        UsageError: sizes that do not fit, too little text, or `out` exists.
        UnsupportedModelError, CheckpointError: see `load_dense`.
    """
    target = Path(out)
    if target.exists():
        raise UsageError(f"{target} exists already. Give a new folder or remove it first.")
    if top_k < 1 or experts < top_k or experts % top_k:
        raise UsageError(
            f"{experts} experts cannot be dealt out in groups of top_k={top_k}. Give a multiple of top_k."
        )
    model, tokenizer = load_dense(source)
    neurons = model.config.intermediate_size
    width = neurons * 3 // 4 // top_k if width is None else width
    if not 1 <= width * top_k <= neurons:
        raise UsageError(
            f"top_k={top_k} experts of width {width} need {width * top_k} neurons, the model has {neurons}."
        )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < length:
        raise UsageError(f"The text has {len(ids)} tokens, at least {length} are needed. Give more text.")
    ids_SC = cut_sequences(ids, length, tokens)
    if ids_SC.numel() < experts // top_k * 16:
        raise UsageError(
            f"{ids_SC.numel()} tokens are too few for {experts} experts. Give more text or fewer experts."
        )
    log.info("converting %s on %d tokens", source, ids_SC.numel())
    full = width * top_k == neurons
    config = FitConfig(experts // top_k, width * top_k, own_rank=None if refit and not full else 0)
    with complete_folder(target) as folder, layer_bar(len(model.model.layers), progress) as bar:
        write_mixtral(
            model,
            tokenizer,
            fit_layers(model, ids_SC, config),
            folder,
            top_k=top_k,
            dtype=dtype,
            on_layer=bar,
        )
    return target
