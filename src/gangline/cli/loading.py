"""From the options of a command to a loaded model and its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gangline.cli.options import LoadOptions
from gangline.cli.output import Output
from gangline.core.errors import CheckpointError
from gangline.core.sizes import parse_size


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        model: the transformers model; ``model.gangline`` is its runtime.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any


@contextmanager
def loaded(model: str, options: LoadOptions, out: Output) -> Iterator[Loaded]:
    """Load a model with its tokenizer, and free it afterwards.

    Raises:
        CheckpointError: the model has no tokenizer, or cannot be read.
    """
    from gangline.evaluation.plain import find_checkpoint, load_tokenizer

    if options.memory is not None:
        parse_size(options.memory)  # before anything slow
    tokenizer = load_tokenizer(find_checkpoint(model, options.revision))
    if tokenizer is None:
        raise CheckpointError(
            f"{model} has no tokenizer, so it cannot read text; 'gangline bench' can time it"
        )
    import gangline

    found = gangline.load(
        model,
        memory=options.memory,
        ctx_size=options.ctx_size,
        **load_arguments(options),
    )
    try:
        yield Loaded(found, tokenizer)
    finally:
        found.gangline.close()


def load_arguments(options: LoadOptions) -> dict[str, Any]:
    """Return the keyword arguments of ``gangline.load`` that do not decide the budget."""
    return {
        "precision": options.precision,
        "dtype": _dtype(options.dtype),
        "threads": options.threads,
        "io": options.io,
        "revision": options.revision,
    }


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
