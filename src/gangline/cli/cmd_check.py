"""``gangline check``: proof that placement does not change the answer."""

from typing import TYPE_CHECKING, Annotated

import typer

from gangline.cli.options import ComputeOptions, ModelArgument, ModelOptions, ModeOption, option
from gangline.cli.output import Output
from gangline.cli.state import NOT_PASSED

if TYPE_CHECKING:
    from gangline.evaluation.check_report import Case, CheckReport


def check(
    out: Output,
    model: ModelArgument,
    options: ModelOptions,
    compute: ComputeOptions,
    share: Annotated[
        list[float], option("--share", help="Share of the experts in memory; repeat. The smallest is added.")
    ] = [1.0, 0.5, 0.25],  # noqa: B006 - typer copies it
    batch: Annotated[list[int], option("--batch", help="Sequences at once; repeat.", min=1)] = [1, 3],  # noqa: B006
    orders: Annotated[
        int, option("--orders", help="Cache orders: the default one, the rest evict at random.", min=1)
    ] = 2,
    prompt_tokens: Annotated[int, option("--prompt-tokens", help="Tokens of each prompt.", min=1)] = 24,
    new_tokens: Annotated[int, option("--new-tokens", help="Tokens of each answer.", min=1)] = 16,
    reference: Annotated[
        bool,
        typer.Option("--reference/--no-reference", help="Compare with the plain transformers model too."),
    ] = True,
    mode: ModeOption = "hint",
) -> None:
    """Compare budgets, batches and cache orders, and the plain model. Exit code 3 if they differ."""
    from gangline.cli.loading import load_arguments
    from gangline.evaluation.check import CheckSettings, check_model

    settings = CheckSettings(
        shares=tuple(share),
        batch_sizes=tuple(batch),
        cache_seeds=(None, *range(1, orders)),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=compute.seed,
        reference=reference,
    )
    report = check_model(model, settings, progress=out.note, **load_arguments(options, compute, mode))
    out.data(report.to_dict())
    _show(out, report)
    if not report.passed:
        raise typer.Exit(NOT_PASSED)


def _show(out: Output, report: "CheckReport") -> None:
    from rich.table import Table

    table = Table(
        "experts in memory",
        "slots",
        "cache",
        "batch",
        "bits equal",
        "tokens as plain",
        "logits off by",
        "read",
        box=None,
    )
    for case in report.cases:
        table.add_row(*_cells(case))
    out.show(table)
    for line in _ties(report):
        out.show(line)
    tolerance = "" if report.tolerance is None else f", tolerance {report.tolerance:.3g}"
    out.show(f"compared with: {report.baseline}")
    out.show(f"reference: {report.reference}{tolerance}")
    verdict = "passed" if report.passed else "NOT PASSED"
    if report.passed and report.approximate is not None:
        verdict = "approximate, not exact"
        same = sum(case.same_tokens for case in report.cases) / len(report.cases)
        worst = max(case.max_abs_logit_diff for case in report.cases)
        out.show(f"{report.approximate}: {same:.1%} of the tokens the same, logits off by up to {worst:.3g}")
    out.show(f"{verdict}: {report.model}, {report.dtype}, experts {report.precision}")


def _cells(case: "Case") -> tuple[str, ...]:
    same = {None: "-", True: "yes", False: "no"}
    off = case.reference_max_abs_logit_diff
    return (
        case.budget,
        str(case.expert_slots),
        case.cache,
        str(case.batch),
        "yes" if case.identical else f"NO, {case.max_abs_logit_diff:.3g}, {case.same_tokens:.0%} of tokens",
        same[case.reference_tokens_equal],
        "-" if off is None else f"{off:.3g}",
        str(case.misses),
    )


def _ties(report: "CheckReport") -> list[str]:
    """Return one line per place where a token or a routing differs from the plain model's."""
    lines = []
    for item in dict.fromkeys(found for case in report.cases for found in case.divergences):
        near = report.tolerance is not None and item.margin <= 2 * report.tolerance
        lines.append(
            f"row {item.row}, token {item.position}: {item.token} instead of {item.reference_token}, "
            f"which the plain model preferred by {item.margin:.3g}" + (" (a near-tie)" if near else "")
        )
    for flip in report.flips:
        lines.append(
            f"row {flip.row}, position {flip.position}, {flip.layer}: experts {flip.experts} instead of "
            f"{flip.reference_experts}, inputs within {flip.input_difference:.2g} (a router tie)"
        )
    return lines
