"""What to record: pieces of text, or prompts, with their labels, read from files.

A ``.jsonl`` file has one object per line with ``text`` (or ``prompt``, or ``messages`` for a chat) and,
beside it, labels such as ``"domain": "code"``. Any other file is plain text: for recording text the whole
file is one text, for prompts each line that is not empty is one prompt.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gangline.core.errors import UsageError


@dataclass(frozen=True)
class Item:
    """One document to record.

    Attributes:
        source: file and place, in words.
        ids: its token ids.
        labels: kind and name.
    """

    source: str
    ids: tuple[int, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


def text_items(
    paths: Sequence[Path], tokenizer: Any, *, window: int, labels: Mapping[str, str] | None = None
) -> list[Item]:
    """Cut texts into documents of at most ``window`` tokens that do not overlap.

    A special first token of the tokenizer begins each of them.

    Raises:
        UsageError: a file cannot be read, a line is not as said above, or nothing is left.
    """
    items: list[Item] = []
    for source, value, own in _values(paths, "text"):
        ids = list(tokenizer(value, add_special_tokens=False)["input_ids"])
        first = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
        step = max(1, window - len(first))
        for start in range(0, len(ids), step):
            piece = (*first, *ids[start : start + step])
            items.append(Item(f"{source}, tokens from {start}", piece, {**(labels or {}), **own}))
    return _checked(items, paths)


def prompt_items(
    paths: Sequence[Path], tokenizer: Any, *, raw: bool = False, labels: Mapping[str, str] | None = None
) -> list[Item]:
    """Return one document per prompt, in the model's chat template unless ``raw`` or it has none.

    Raises:
        UsageError: as for :func:`text_items`.
    """
    items = []
    chat = not raw and getattr(tokenizer, "chat_template", None) is not None
    for source, value, own in _values(paths, "prompt"):
        messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
        if isinstance(value, list) and not chat:
            raise UsageError(f"{source}: messages need a chat template, which this model has not; use prompt")
        if chat:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(value)["input_ids"]
        items.append(Item(source, tuple(ids), {**(labels or {}), **own}))
    return _checked(items, paths)


def _checked(items: list[Item], paths: Sequence[Path]) -> list[Item]:
    items = [item for item in items if item.ids]
    if not items:
        raise UsageError(f"{', '.join(map(str, paths)) or 'no file'} holds no text; name a file with some")
    kinds = {frozenset(item.labels) for item in items}
    if len(kinds) > 1:
        raise UsageError(
            "some documents have labels that others lack; give every line the same kinds, or use --label"
        )
    return items


def _values(paths: Sequence[Path], kind: str) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Yield source, text or messages, and labels."""
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as text ({error}); name a UTF-8 text file") from error
        if path.suffix in (".jsonl", ".ndjson"):
            yield from _lines(path, content)
        elif kind == "prompt":
            for number, line in enumerate(content.splitlines(), 1):
                if line.strip():
                    yield f"{path.name}:{number}", line.strip(), {}
        elif content.strip():
            yield path.name, content, {}


def _lines(path: Path, content: str) -> Iterator[tuple[str, Any, dict[str, str]]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{where} is not JSON ({error}); write one object per line") from error
        record = record if isinstance(record, dict) else {}
        value = next((record.pop(k) for k in ("text", "prompt", "messages") if k in record), None)
        if not isinstance(value, str | list):
            raise UsageError(f"{where} has no text, prompt or messages; write one of them in every line")
        yield where, value, {kind: str(name) for kind, name in record.items() if isinstance(name, str | int)}
