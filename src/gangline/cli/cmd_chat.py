"""``gangline chat``: a conversation in the terminal."""

import dataclasses
import sys
from typing import Annotated, Any

from gangline.cli.answer import SamplingOptions
from gangline.cli.options import BudgetOptions, ComputeOptions, ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import ContextError, UsageError

HELP = "/exit leaves, /reset forgets the conversation, /stats says what it took"


def chat(
    out: Output,
    model: ModelArgument,
    budget: BudgetOptions,
    compute: ComputeOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, option("--system", help="Instructions before the conversation.")] = None,
) -> None:
    """Talk with a model within a memory budget."""
    from gangline.cli.loading import loaded

    with loaded(model, budget, compute, native_only=True) as ready:
        if not ready.tokenizer.chat_template:
            raise UsageError(f"{model} has no chat template; use 'gangline run {model} PROMPT'")
        import torch

        torch.manual_seed(compute.seed)
        _converse(out, ready, budget.ctx_size, sampling, system)


def _converse(
    out: Output, ready: Any, ctx_size: int | None, sampling: SamplingOptions, system: str | None
) -> None:
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    if sys.stdin.isatty():
        out.note(HELP)
    while (line := _read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line == "/stats":
            out.note(ready.model.gangline.banner())
        elif line.startswith("/"):
            out.note(HELP)
        elif line:
            _turn(out, ready, ctx_size, sampling, messages, line)


def _turn(
    out: Output,
    ready: Any,
    ctx_size: int | None,
    sampling: SamplingOptions,
    messages: list[dict[str, str]],
    line: str,
) -> None:
    """Answer one line; what was said is added to ``messages`` unless it did not fit the context."""
    from gangline.cli.answer import chat_ids, generate

    asked = [*messages, {"role": "user", "content": line}]
    try:
        answer = generate(ready, chat_ids(ready.tokenizer, asked), sampling, ctx_size, out.stream)
    except ContextError as error:
        out.note(f"error: {error}; /reset begins again")
        return
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        out.note("(stopped)")
        return
    out.stream("\n")
    messages[:] = [*asked, {"role": "assistant", "content": answer.text}]
    out.data({"user": line, **dataclasses.asdict(answer)})


def _read_line() -> str | None:
    """Return the next line without surrounding blanks, or None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401 - gives input() its editing and history

    try:
        return input("> ").strip()
    except EOFError:
        return None
