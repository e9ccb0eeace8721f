"""``gangline tune``: which policy is fastest for a model in a memory budget on this machine."""

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gangline.cli.options import BudgetOptions, ComputeOptions, ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError
from gangline.core.sizes import format_size

if TYPE_CHECKING:
    from gangline.evaluation.tuning import Candidate, TuneReport


def tune(
    out: Output,
    model: ModelArgument,
    budget: BudgetOptions,
    compute: ComputeOptions,
    data: Annotated[
        list[Path], option("--data", metavar="FILE", help="Text to tune on; repeat. (Default: our own.)")
    ] = [],  # noqa: B006 - typer copies it
    trace: Annotated[
        Path | None, option("--trace", metavar="DIR", help="Simulate on this trace instead of recording one.")
    ] = None,
    prompt_tokens: Annotated[int, option("--prompt-tokens", help="Tokens of each prompt.", min=1)] = 48,
    new_tokens: Annotated[int, option("--new-tokens", help="Tokens decoded after it.", min=2)] = 48,
    rounds: Annotated[int, option("--rounds", help="Live rounds, in turns.", min=1)] = 5,
    best: Annotated[int, option("--best", help="Simulated compositions to confirm live.", min=1)] = 3,
    dry_run: Annotated[bool, option("--dry-run", help="Do not keep the choice.")] = False,
) -> None:
    """Simulate every exact policy, run the best in turns, and keep the fastest for this model and memory."""
    if compute.policy is not None:
        raise UsageError("tune chooses the policy; leave --policy out")
    from gangline.cli.loading import load_arguments
    from gangline.evaluation.tuning import TuneSettings, tune_model

    settings = TuneSettings(
        data=tuple(path.expanduser() for path in data),
        trace=trace,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        best=best,
        predictor=compute.predictor,
        store=not dry_run,
    )
    arguments = load_arguments(budget, dataclasses.replace(compute, predictor=None))
    for chosen_here in ("policy", "predictor"):
        del arguments[chosen_here]
    report = tune_model(model, settings, progress=out.note, **arguments)
    out.data(report.to_dict())
    _show(out, report)


def _show(out: Output, report: "TuneReport") -> None:
    from rich.table import Table

    memory = "the memory that is free" if report.memory is None else format_size(report.memory)
    out.show(f"{report.model} in {memory}: {report.slots} of {report.experts} experts have a slot")
    if report.candidates:
        table = Table("policy", "simulated", "hit rate", "read per token", "live", "to default", "", box=None)
        for column in table.columns[1:6]:
            column.justify = "right"
        for item in report.candidates:
            table.add_row(*_cells(item), "chosen" if item.name == report.choice else "")
        out.show(table)
    for note in report.notes:
        out.show(f"note: {note}")
    if report.stored is not None:
        out.show(f"gangline uses {report.choice} for this model and memory from now on (--policy overrides)")


def _cells(item: "Candidate") -> tuple[str, ...]:
    speed, hits = item.simulated_tokens_per_second, item.simulated_hit_rate
    live = f"{statistics.median(item.tokens_per_second):.2f} tokens/s" if item.tokens_per_second else ""
    return (
        item.name,
        "-" if speed is None else f"{speed:.2f} tokens/s",
        "-" if hits is None else f"{hits:.1%}",
        format_size(item.simulated_bytes_per_token),
        live,
        "" if item.ratio is None else f"{item.ratio:.2f}x",
    )
