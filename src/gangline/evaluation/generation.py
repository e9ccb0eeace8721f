"""Generation with everything that a comparison needs kept: the tokens, and the logits they were chosen from.

Legend: B sequences, P prompt tokens, N new tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from gangline.core.errors import UnsupportedModelError

# What the model's own generation settings must keep for generate() to work at all.
_KEPT = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "prefill_chunk_size")


@dataclass(frozen=True)
class Generation:
    """Greedy continuations.

    Attributes:
        tokens_BN: chosen token ids.
        logits_BNV: logits before any processing, as float32 on the CPU.
    """

    tokens_BN: Tensor
    logits_BNV: Tensor


def generate_greedy(model: Any, ids_BP: Tensor, new_tokens: int) -> Generation:
    """Continue every row by exactly ``new_tokens`` tokens, always taking the largest logit.

    The model's own generation settings (sampling, penalties, end tokens) are set aside meanwhile.
    """
    with fixed_length(model, new_tokens), torch.inference_mode():
        result = model.generate(
            ids_BP,
            attention_mask=torch.ones_like(ids_BP),
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits_BNV = torch.stack(result.logits, dim=1).float().cpu()
    return Generation(result.sequences[:, -new_tokens:].cpu(), logits_BNV)


def require_generation(model: Any) -> None:
    """Refuse a model that transformers cannot generate text with.

    Raises:
        UnsupportedModelError: names its class.
    """
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not generate text; load it with gangline.load and call it yourself"
        )


@contextmanager
def fixed_length(model: Any, new_tokens: int, *, sample: bool = False) -> Iterator[None]:
    """Make ``model.generate`` produce exactly ``new_tokens`` tokens, end tokens included.

    Greedy by default; with ``sample`` drawn from the model's own probabilities.

    Raises:
        UnsupportedModelError: the model does not generate text.
    """
    require_generation(model)
    before = model.generation_config
    kept = {name: getattr(before, name, None) for name in _KEPT}
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = 0
    model.generation_config = GenerationConfig(
        do_sample=sample,
        top_k=0 if sample else None,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        use_cache=True,
        **kept,
    )
    try:
        yield
    finally:
        model.generation_config = before
