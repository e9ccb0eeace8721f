"""``gangline plan``: where each byte would go, from headers alone."""

from typing import TYPE_CHECKING, Any

from gangline.cli.options import BudgetOptions, ModelArgument, ModeOption, PolicyOption
from gangline.cli.output import Output
from gangline.core.sizes import format_size

if TYPE_CHECKING:
    from gangline.runtime.planner import MemoryPlan


def plan(
    out: Output,
    model: ModelArgument,
    budget: BudgetOptions,
    policy: PolicyOption = None,
    mode: ModeOption = "hint",
) -> None:
    """Say whether a model fits, where its bytes would go, and how fast it would be."""
    import gangline
    from gangline.cli.loading import load_arguments, tokenizer_at_hand

    # 'run' has the tokenizer in memory when it plans, so that the smallest budget named here works there.
    tokenizer = tokenizer_at_hand(model, budget)
    asked = {} if policy is None and mode == "hint" else {"policy": policy, "mode": mode}
    found = gangline.plan(model, **load_arguments(budget), **asked)
    del tokenizer
    out.data(found.to_dict())
    _show(out, model, found)


def _show(out: Output, model: str, plan: "MemoryPlan") -> None:
    from rich.table import Table

    table = Table("what", "size", "why", box=None)
    table.columns[1].justify = "right"
    for what, size, why in plan.rows_table():
        table.add_row(what, format_size(size), why)
    table.add_row("peak", format_size(plan.peak), _verdict(plan))
    kind = "exact" if plan.precision == "stored" and not plan.low_slots else "approximate"
    out.show(f"{model}: experts {'+'.join(plan.codecs)} ({kind}), {format_size(plan.expert_bytes)} in all")
    out.show(table)
    for line in _speed(plan):
        out.show(line)
    for note in plan.notes:
        out.show(f"note: {note}")


def _verdict(plan: "MemoryPlan") -> str:
    smallest = f"the smallest budget that works is {plan.smallest_advised >> 20} MiB"
    if plan.budget is None:
        return smallest
    return f"fits in {format_size(plan.budget)}; {smallest}"


def _speed(plan: "MemoryPlan") -> list[str]:
    """Return what the measured machine makes of the plan; nothing where it was not measured."""
    if not plan.speed:
        return []
    speed = plan.speed
    uniform, local = speed["hit_rate"]
    return [
        f"decode:  {_band(speed['decode_tokens_per_second'])} tokens/s, limited by {speed['bound']}",
        f"prefill: {_band(speed['prefill_tokens_per_second'])} tokens/s "
        f"(first prompt, {speed['prompt_tokens']} tokens)",
        f"hit rate: {uniform:.2f} with uniform routing, {local:.2f} with locality",
        *_of_two(speed),
    ]


def _of_two(speed: dict[str, Any]) -> list[str]:
    """Return the line on what misses are computed in, where there are two precisions."""
    if "low_share" not in speed:
        return []
    low, skipped = ([f"{share:.0%}" for share in speed[key]] for key in ("low_share", "skipped_share"))
    return [
        f"experts of a token: {low[0]} in low precision and {skipped[0]} left out if they weigh alike, "
        f"{low[1]} and {skipped[1]} if unequally (assumed)"
    ]


def _band(pair: list[float]) -> str:
    low, high = (f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}" for rate in pair)
    return f"{low} to {high}"
