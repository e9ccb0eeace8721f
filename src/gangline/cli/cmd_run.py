"""``gangline run``: one answer."""

import dataclasses
import sys
from typing import Annotated

import typer

from gangline.cli.answer import SamplingOptions
from gangline.cli.options import BudgetOptions, ComputeOptions, ModelArgument, ModeOption, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError


def run(
    out: Output,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; '-' reads it from stdin.")],
    budget: BudgetOptions,
    compute: ComputeOptions,
    sampling: SamplingOptions,
    raw: Annotated[
        bool, option("--raw", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    mode: ModeOption = "hint",
    stats: Annotated[bool, option("--stats", help="Say on stderr what it took.")] = False,
) -> None:
    """Answer one prompt within a memory budget."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty; write it after the model, or pipe it in with '-'")
    from gangline.cli.answer import generate, prompt_ids
    from gangline.cli.loading import loaded

    with loaded(model, budget, compute, mode, native_only=True) as ready:
        import torch

        torch.manual_seed(compute.seed)
        answer = generate(
            ready, prompt_ids(ready.tokenizer, text, raw=raw), sampling, budget.ctx_size, out.stream
        )
        runtime = ready.model.gangline
        banner = answer.banner(runtime.banner())
        out.stream("\n")
        if not answer.finished:
            out.note(f"(cut after {answer.new_tokens} tokens; --max-new-tokens and --ctx-size allow more)")
        if stats:
            out.note(banner)
        elif (changed := runtime.stats().approximate) is not None:
            measure = "check --mode mixed" if mode == "mixed" else "predict eval --mode execute"
            out.note(f"approximate: {changed}; 'gangline {measure}' measures what it costs")
        out.data(
            {
                "model": model,
                **dataclasses.asdict(answer),
                "banner": banner,
                "stats": runtime.stats().to_dict(),
            }
        )
