"""``gangline simulate``: how caches would do on recorded routing, beside what no cache can beat."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gangline.cli.options import option
from gangline.cli.output import Output
from gangline.core.errors import UsageError
from gangline.core.sizes import format_size, parse_size

if TYPE_CHECKING:
    from gangline.evaluation.simulation import ModelParts, SimulationResult

Replay = Literal["passes", "tokens"]


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """Whole systems, and what they learn from."""

    systems: Annotated[
        str,
        option(
            "--systems",
            help="Compositions, separated by commas: cache, predictor and prefetch together; or 'all'.",
        ),
    ] = ""
    calibrate: Annotated[
        Path | None, option("--calibrate", metavar="TRACE", help="Trace from which static-hot learns.")
    ] = None
    predictor: Annotated[
        Path | None,
        option("--predictor", metavar="FILE", help="Trained predictor for a system that needs one."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """What moving and computing cost."""

    link: Annotated[
        str | None,
        option(
            "--link", help="Bytes per second that bring experts, as 1.5GB. (Default: as doctor measured.)"
        ),
    ] = None
    compute_us: Annotated[
        float | None,
        option("--compute-us", help="Microseconds of one expert. (Default: its bytes at memory speed.)"),
    ] = None
    layer_us: Annotated[
        float, option("--layer-us", help="Microseconds between two MoE layers (attention).", min=0.0)
    ] = 0.0


def simulate(
    out: Output,
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="Folder that 'gangline trace' wrote.", show_default=False)
    ],
    systems: SystemOptions,
    times: TimeOptions,
    policies: Annotated[
        str,
        option("--policies", help="Caches, separated by commas; with parameters as NAME:KEY=VALUE."),
    ] = "layer-lru,lru,lfu",
    capacity: Annotated[
        str,
        option(
            "--capacity",
            help="Expert slots, separated by commas: a number, a share (50%), bytes (2GiB), or rho=2 (times "
            "the experts of a token).",
        ),
    ] = "25%,50%,75%",
    phase: Annotated[
        Literal["all", "prefill", "decode"], option("--phase", help="Which passes to replay.")
    ] = "all",
    replay: Annotated[
        Replay | None,
        option(
            "--replay",
            help="Passes as recorded, or every token as a decoding pass of its own. (Default: passes where "
            "the model wrote the text, else tokens.)",
        ),
    ] = None,
    bypass: Annotated[
        bool, option("--bypass", help="Let misses pass through without a slot where a policy prefers it.")
    ] = False,
    ahead: Annotated[
        list[int], option("--oracle", help="Layers ahead that an oracle reads; repeat.", min=1)
    ] = [1, 8],  # noqa: B006 - typer copies it
    tokens: Annotated[int | None, option("--tokens", help="Replay at most this many tokens.", min=1)] = None,
) -> None:
    """Replay a trace through cache policies; prints hit rates, bytes and modelled speed beside the bounds."""
    from gangline.evaluation.simulation import SimulationSettings, simulate_trace
    from gangline.traces import open_trace

    settings = SimulationSettings(
        policies=_listed(policies),
        capacities=_listed(capacity),
        systems=_listed(systems.systems),
        phase=None if phase == "all" else phase,
        replay=replay,
        link=None if times.link is None else float(parse_size(times.link)),
        expert_seconds=None if times.compute_us is None else times.compute_us * 1e-6,
        layer_seconds=times.layer_us * 1e-6,
        bypass=bypass,
        oracles=tuple(ahead),
        tokens=tokens,
        calibration=None if systems.calibrate is None else open_trace(systems.calibrate),
    )
    if not (settings.policies or settings.systems) or not settings.capacities:
        raise UsageError(
            "name at least one policy and one capacity, for example --policies lru --capacity 50%"
        )
    with _bar() as progress:
        result = simulate_trace(
            open_trace(trace), settings, progress=progress, model=_model(systems.predictor)
        )
    out.data(result.to_dict())
    _show(out, result)


def _model(predictor: Path | None) -> "ModelParts | None":
    """Return what a trained predictor's file gives a simulation."""
    if predictor is None:
        return None
    from gangline.evaluation.simulation import ModelParts
    from gangline.policies.predictors.saved import load_predictor

    saved = load_predictor(predictor)
    return ModelParts(network=saved.network, network_kind=saved.kind)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _bar() -> Any:
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def bar() -> Any:
        with tqdm(desc="simulating", unit="run", disable=None) as shown:

            def progress(done: int, total: int) -> None:
                shown.total = total
                shown.update(done - shown.n)

            yield progress

    return bar()


def _show(out: Output, result: "SimulationResult") -> None:
    from rich.table import Table

    out.show(
        f"{result.trace}: {result.model}, {result.tokens:,} tokens, {result.experts} experts of "
        f"{format_size(result.expert_bytes)}, {result.replay}"
    )
    timed = any(row.tokens_per_second is not None for row in result.rows)
    headings = ["policy", "slots", "rho", "hit rate", "prefill", "decode", "of Belady", "read per token"]
    table = Table(*headings, *(["tokens/s", "of bound"] if timed else []), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    last = None
    for row in result.rows:
        if last is not None and row.slots != last:
            table.add_row()
        last = row.slots
        by_phase = (row.phases.get(name, {}).get("hit_rate") for name in ("prefill", "decode"))
        nbytes = row.levels[0].bytes_per_token if row.levels else row.misses_per_token * result.expert_bytes
        cells = [
            row.policy,
            str(row.slots),
            f"{row.rho:.2f}",
            _percent(row.hit_rate),
            *map(_percent, by_phase),
            _percent(row.of_belady),
            format_size(nbytes),
        ]
        if timed:
            cells += ["" if row.tokens_per_second is None else f"{row.tokens_per_second:.3g}"]
            cells += [_percent(row.bound_share)]
        table.add_row(*cells)
    out.show(table)
    for note in result.notes:
        out.show(f"note: {note}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
