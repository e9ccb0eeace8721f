"""From the options of a command to a loaded model and its tokenizer."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangline.cli.options import BudgetOptions, ComputeOptions, ModelOptions, PredictionMode
from gangline.core.errors import CheckpointError
from gangline.core.sizes import parse_size

if TYPE_CHECKING:
    from gangline.runtime.head_start import HeadStart


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
    model: str,
    budget: BudgetOptions,
    compute: ComputeOptions,
    mode: PredictionMode = "hint",
    *,
    native_only: bool = False,
) -> Iterator[Loaded]:
    """Load a model with its tokenizer, and free it afterwards.

    Args:
        model, budget, compute, mode: what the user said.
        native_only: nothing but answers is asked of it; see :class:`~gangline.runtime.options.LoadOptions`.

    Raises:
        CheckpointError: the model has no tokenizer, or cannot be read.
    """
    from gangline.cli.startup import import_libraries

    with _head_start(model, budget, compute) as head_start:
        import_libraries(head_start.begin if head_start is not None else lambda: None)
        arguments = load_arguments(budget, compute, mode) | {"native_only": native_only}
        loaded_model, tokenizer = _load(model, budget, arguments, head_start)
    try:
        yield Loaded(loaded_model, tokenizer)
    finally:
        loaded_model.gangline.close()


@contextmanager
def _head_start(model: str, budget: BudgetOptions, compute: ComputeOptions) -> Iterator["HeadStart | None"]:
    """Give what can read experts while libraries are imported, if this may be done with these options."""
    if budget.memory is not None or budget.dtype is not None or budget.device not in (None, "cpu"):
        yield None
        return
    from gangline.runtime.head_start import HeadStart

    path = Path(model).expanduser()
    place = str(path.resolve()) if path.exists() else model
    head_start = HeadStart(place, budget.revision, budget.precision, compute.io)
    try:
        yield head_start
    finally:
        head_start.close()


def _load(
    model: str, budget: BudgetOptions, arguments: dict[str, Any], head_start: "HeadStart | None"
) -> tuple[Any, Any]:
    """Return the model and its tokenizer."""
    from gangline.evaluation.generation import require_generation
    from gangline.evaluation.plain import find_checkpoint, has_tokenizer_files, load_tokenizer

    checkpoint = find_checkpoint(model, budget.revision)
    found: list[Any] = []

    def read_tokenizer() -> None:
        if not found:
            found.append(load_tokenizer(checkpoint))

    # A budget counts it: a large vocabulary takes a hundred MiB. Without one it is read while experts are.
    if budget.memory is not None or not has_tokenizer_files(checkpoint):
        read_tokenizer()
        if found == [None]:
            raise CheckpointError(
                f"{model} has no tokenizer, so it cannot read text; 'gangline bench' can time it"
            )
    import gangline

    loaded_model = gangline.load(model, meanwhile=read_tokenizer, head_start=head_start, **arguments)
    try:
        require_generation(loaded_model)
    except BaseException:
        loaded_model.gangline.close()
        raise
    return loaded_model, found[0]


def tokenizer_at_hand(model: str, options: ModelOptions) -> Any | None:
    """Return the tokenizer of a model whose files are here; None where nothing is, and nothing is fetched."""
    from gangline.cli.startup import import_libraries

    import_libraries()
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
