"""From the options of a command to a loaded model and its tokenizer."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gangline.cli.options import BudgetOptions, ComputeOptions, ModelOptions, PredictionMode
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
def loaded(
    model: str, budget: BudgetOptions, compute: ComputeOptions, mode: PredictionMode = "hint"
) -> Iterator[Loaded]:
    """Load a model with its tokenizer, and free it afterwards.

    Raises:
        CheckpointError: the model has no tokenizer, or cannot be read.
    """
    from gangline.cli.startup import import_libraries

    import_libraries()
    from gangline.evaluation.generation import require_generation
    from gangline.evaluation.plain import find_checkpoint, has_tokenizer_files, load_tokenizer

    arguments = load_arguments(budget, compute, mode)
    checkpoint = find_checkpoint(model, budget.revision)
    found: list[Any] = []

    def read_tokenizer() -> None:
        if not found:
            found.append(load_tokenizer(checkpoint))

    if not has_tokenizer_files(checkpoint):
        read_tokenizer()
        if found == [None]:
            raise CheckpointError(
                f"{model} has no tokenizer, so it cannot read text; 'gangline bench' can time it"
            )
    import gangline

    loaded_model = gangline.load(model, meanwhile=read_tokenizer, **arguments)
    try:
        require_generation(loaded_model)
        yield Loaded(loaded_model, found[0])
    finally:
        loaded_model.gangline.close()


def tokenizer_at_hand(model: str, options: ModelOptions) -> Any | None:
    """Return the tokenizer of a model whose files are here; None where nothing is, and nothing is fetched."""
    from gangline.checkpoint.locate import LocalCheckpoint, resolve_checkpoint
    from gangline.evaluation.plain import load_tokenizer, place

    found = resolve_checkpoint(place(model), options.revision, need_weights=False)
    if not isinstance(found, LocalCheckpoint):
        return None
    return load_tokenizer(dataclasses.replace(found, name=model))


def load_arguments(
    options: ModelOptions, compute: ComputeOptions | None = None, mode: PredictionMode = "hint"
) -> dict[str, Any]:
    """Return the keyword arguments of ``gangline.load`` (without ``compute``: of ``gangline.plan``).

    Raises:
        UsageError: the memory size cannot be read, or there is no such policy.
    """
    arguments = {**dataclasses.asdict(options), "dtype": torch_dtype(options.dtype)}
    if isinstance(options, BudgetOptions) and options.memory is not None:
        arguments["memory"] = parse_size(options.memory)
    if compute is not None:
        from gangline.runtime.policy_choice import asked_policy

        asked_policy(compute.policy, compute.predictor, mode)  # refused before anything is read
        arguments.update(
            threads=compute.threads,
            io=compute.io,
            policy=compute.policy,
            predictor=compute.predictor,
            mode=mode,
        )
    return arguments


def torch_dtype(name: str | None) -> Any:
    """Return the torch type of ``--dtype``, None if it was not given."""
    if name is None:
        return None
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
