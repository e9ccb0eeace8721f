"""The vocabulary of a GGUF file, from a transformers folder."""

from pathlib import Path
from typing import Any


def add_vocabulary(writer: Any, folder: Path, config: Any) -> None:
    """Write the tokenizer of ``folder``, or a placeholder vocabulary with which llama.cpp takes token ids."""
    writer.add_tokenizer_model("none")
    for token, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        value = getattr(config, f"{token}_token_id", None)
        if isinstance(value, int):
            add(value)
