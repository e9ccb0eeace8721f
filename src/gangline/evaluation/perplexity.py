"""Perplexity of a text, in windows.

Legend: S tokens of the text, W tokens of a window.
"""

import math
from typing import Any

import torch

from gangline.core.errors import UsageError


def perplexity(model: Any, tokenizer: Any, text: str, *, window: int = 512) -> float:
    """Return ``exp`` of the mean negative log-likelihood per token.

    The text is cut into windows that do not overlap; the first token of each window is given and not counted,
    so results of the same window compare with each other only.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; no special tokens are added.
        window: tokens W per forward pass.

    Raises:
        UsageError: the window or the text has fewer than two tokens.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing; give 2 or more")
    ids_S = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if len(ids_S) < 2:
        raise UsageError(f"the text has {len(ids_S)} tokens; perplexity needs 2 or more")
    total, counted = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids_S) - 1, window):
            ids_1W = ids_S[start : start + window].unsqueeze(0)
            logits_WV = model(ids_1W.to(model.device), use_cache=False).logits[0, :-1].float()
            targets_W = ids_1W[0, 1:].to(logits_WV.device)
            total += float(torch.nn.functional.cross_entropy(logits_WV, targets_W, reduction="sum"))
            counted += len(targets_W)
    return math.exp(total / counted)
