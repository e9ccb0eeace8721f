"""The tokenizer inside a GGUF file.

transformers builds it from the file's tokens and merges. The rule that splits text before merging is only
named in the file: transformers knows some of these names, and here are two more kinds that MoE files use. For
a name that nobody knows, a ``tokenizer.json`` beside the file is taken; without one there is a warning,
because the same text may become other tokens.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gangline.checkpoint.gguf_header import Value
from gangline.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_GPT2_RULES = {"gpt-2", "olmo", "mpt"}
_DIGIT_RULES = {"smollm", "starcoder", "refact", "command-r"}


def read_tokenizer(path: Path, metadata: Mapping[str, Value]) -> Any | None:
    """Return a transformers tokenizer, or ``None`` if there is no vocabulary in the file and none beside it.

    Args:
        path: the GGUF file (the first of a split model).
        metadata: its key-value pairs.

    Raises:
        CheckpointError: transformers cannot build this tokenizer.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    rule = str(metadata.get("tokenizer.ggml.pre", "missing"))
    beside = (path.parent / "tokenizer.json").is_file()
    inside = kind not in ("none", "no_vocab") and "tokenizer.ggml.tokens" in metadata
    known = kind != "gpt2" or rule in _GPT2_RULES | _DIGIT_RULES | _rules_of_transformers()
    if not inside and not beside:
        return None
    try:
        if beside and not (inside and known):
            return _load(path.parent)
        tokenizer = _load(path.parent, gguf_file=path.name)
    except Exception as error:  # the tokenizers library raises plain exceptions
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: transformers cannot build its tokenizer ({reason}); put a tokenizer.json beside it"
        ) from error
    if not known:
        logger.warning(
            "%s: nobody here knows the splitting rule %r; if text becomes odd tokens, put the model's "
            "tokenizer.json beside the file",
            path,
            rule,
        )
    if kind == "gpt2" and rule in _DIGIT_RULES:
        _split_digits(tokenizer)
    return tokenizer


def _load(folder: Path, **source: Any) -> Any:
    """Load a tokenizer by its files: AutoTokenizer would first ask for a config that it knows."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, **source)


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _rules_of_transformers() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # another release keeps them elsewhere; then the warning comes too often
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)
