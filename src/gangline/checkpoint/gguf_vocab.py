"""The vocabulary of a GGUF file, from the ``tokenizer.json`` of a transformers folder.

llama.cpp knows two kinds that MoE models use: byte-level BPE with one of its named splitting rules
(``gpt2``), and BPE with byte fallback from SentencePiece (``llama``), where a score replaces the order of
merges. A tokenizer that it would follow otherwise is left out with a warning: such a file takes token ids.
"""

import json
import logging
from enum import IntEnum
from pathlib import Path
from typing import Any

from gangline.checkpoint.gguf_header import require_gguf
from gangline.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_SPACE = "▁"  # SentencePiece's mark for a space


class _Kind(IntEnum):
    """Token types of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def add_vocabulary(writer: Any, folder: Path, config: Any) -> None:
    """Write the tokenizer of ``folder``, or a placeholder with which llama.cpp takes token ids.

    Args:
        writer: a ``gguf.GGUFWriter``.
        folder: may hold ``tokenizer.json`` with its companions.
        config: the transformers config; the vocabulary is padded to its size.

    Raises:
        CheckpointError: ``tokenizer.json`` cannot be read.
    """
    tokenizer = _read(folder / "tokenizer.json")
    kind = None if tokenizer is None else _kind(tokenizer)
    if tokenizer is None or kind is None:
        if tokenizer is not None:
            logger.warning(
                "%s: llama.cpp has no rule that splits text as this tokenizer does; the GGUF file goes "
                "without a vocabulary and takes token ids",
                folder,
            )
        _add_placeholder(writer, config)
        return
    model, rule = kind
    texts, kinds = _tokens(tokenizer, config.vocab_size, folder)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(texts)
    writer.add_token_types([int(kind) for kind in kinds])
    if model == "llama":
        writer.add_token_scores(_scores(tokenizer, texts))
        writer.add_add_space_prefix(_prepends_space(tokenizer))
    special = require_gguf().SpecialVocab(folder, load_merges=model == "gpt2", n_vocab=config.vocab_size)
    special.add_special_token = _added(folder, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def _add_placeholder(writer: Any, config: Any) -> None:
    writer.add_tokenizer_model("none")
    for name in ("bos", "eos", "pad"):
        value = getattr(config, f"{name}_token_id", None)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and 0 <= first < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(first)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        tokenizer = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({str(error)[:80]}); remove or replace it"
        ) from error
    return tokenizer if isinstance(tokenizer, dict) and isinstance(tokenizer.get("model"), dict) else None


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of its steps."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get("pretokenizers") or part.get("normalizers") or []
    return [step for child in inner for step in _steps(child)]


def _kind(tokenizer: dict[str, Any]) -> tuple[str, str] | None:
    """GGUF's tokenizer model and splitting rule, or ``None`` if llama.cpp has none that does the same."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges"):
        return None
    if model.get("byte_fallback"):
        return "llama", "default"
    steps = _steps(tokenizer.get("pre_tokenizer"))
    names = [step.get("type") for step in steps]
    if not names or names[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    own_rule = steps[-1].get("use_regex", True)
    if names == ["ByteLevel"] and own_rule:
        return "gpt2", "gpt-2"
    if names == ["Digits", "ByteLevel"] and own_rule and steps[0].get("individual_digits"):
        return "gpt2", "smollm"
    if names == ["Split", "ByteLevel"] and not own_rule:
        pattern, behaviour = steps[0].get("pattern"), steps[0].get("behavior")
        if pattern == {"Regex": PRETOKENIZE_REGEX} and behaviour == "Isolated":
            return "gpt2", "qwen2"
    return None


def _tokens(tokenizer: dict[str, Any], size: int, folder: Path) -> tuple[list[str], list[_Kind]]:
    """Every id's text and type; ids without a token become unused placeholders."""
    model = tokenizer["model"]
    texts = [f"[PAD{number}]" for number in range(size)]
    kinds = [_Kind.UNUSED] * size
    added = tokenizer.get("added_tokens") or []
    entries = [(text, number, _Kind.NORMAL) for text, number in model.get("vocab", {}).items()]
    entries += [
        (token["content"], token["id"], _Kind.CONTROL if token.get("special") else _Kind.USER_DEFINED)
        for token in added
    ]
    for text, number, kind in entries:
        if not 0 <= number < size:
            raise CheckpointError(
                f"{folder}: token {text!r} has id {number}, but the model has {size}; "
                "the tokenizer is another model's"
            )
        if model.get("byte_fallback"):
            if text == model.get("unk_token"):
                kind = _Kind.UNKNOWN
            elif kind is _Kind.NORMAL and len(text) == 6 and text.startswith("<0x"):
                kind = _Kind.BYTE
        texts[number], kinds[number] = text, kind
    return texts, kinds


def _scores(tokenizer: dict[str, Any], texts: list[str]) -> list[float]:
    """SentencePiece merges the pair of the highest score: the earlier a merge, the higher its result."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(tokenizer["model"].get("merges", [])):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault("".join(pair), place)
    return [-float(rank.get(text, len(rank))) for text in texts]


def _prepends_space(tokenizer: dict[str, Any]) -> bool:
    steps = _steps(tokenizer.get("normalizer")) + _steps(tokenizer.get("pre_tokenizer"))
    return any(
        (step.get("type") == "Prepend" and step.get("prepend") == _SPACE)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _added(folder: Path, ids: dict[str, int]) -> dict[str, bool]:
    """Whether the tokenizer itself puts its first and last special token around a text."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return {
        "bos": bool(encoded) and encoded[0] == ids.get("bos"),
        "eos": bool(encoded) and encoded[-1] == ids.get("eos"),
    }
