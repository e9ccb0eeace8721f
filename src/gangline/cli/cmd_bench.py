"""``gangline bench``: speed and memory under a budget, beside what bandwidth allows."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gangline.cli.options import BudgetOptions, ComputeOptions, option
from gangline.cli.output import Output
from gangline.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from gangline.evaluation.speed import Routing
    from gangline.evaluation.speed_report import SpeedReport, Spread


def bench(
    out: Output,
    budget: BudgetOptions,
    compute: ComputeOptions,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="As for run; or give --shape.", show_default=False),
    ] = None,
    shape: Annotated[
        str | None,
        option(
            "--shape", help="Random weights in the sizes of NAME or NAME:LAYERS, for example olmoe-1b-7b:4."
        ),
    ] = None,
    prompt_tokens: Annotated[int, option("--prompt-tokens", help="Tokens of each prompt.", min=1)] = 128,
    new_tokens: Annotated[int, option("--new-tokens", help="Tokens decoded after it.", min=2)] = 32,
    repetitions: Annotated[int, option("--repetitions", "-r", help="Timed runs.", min=1)] = 5,
    batch: Annotated[int, option("--batch", "-b", help="Sequences decoded at once.", min=1)] = 1,
    replay: Annotated[
        str | None, option("--replay", metavar="FILE", help="Use the experts of a recorded routing trace.")
    ] = None,
    record: Annotated[
        str | None, option("--record", metavar="FILE", help="Write the routing of all runs as a trace.")
    ] = None,
) -> None:
    """Time prompt reading and decoding; print peak memory, hit rates and the share of the bandwidth bound."""
    if (model is None) == (shape is None):
        raise UsageError("give either MODEL or --shape NAME")
    from gangline.cli.loading import load_arguments
    from gangline.evaluation.speed import SpeedSettings, bench_model

    settings = SpeedSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        seed=compute.seed,
        batch=batch,
    )
    routing = _routing(replay, record, model or shape)
    report = bench_model(
        model or _make(str(shape), budget),
        settings,
        name=model or shape,
        routing=routing,
        progress=out.note,
        **load_arguments(budget, compute),
    )
    out.data(report.to_dict())
    _show(out, report)


def _routing(replay: str | None, record: str | None, name: str | None) -> "Routing":
    """Return what the two flags ask for."""
    from gangline.benchmarks import recording
    from gangline.benchmarks.replay import load_trace
    from gangline.benchmarks.replay import replay as replay_trace
    from gangline.evaluation.speed import OWN_ROUTING, Routing

    if replay is not None and record is not None:
        raise UsageError("--record would only copy what --replay plays; give one of them")
    if replay is not None:
        trace = load_trace(Path(replay).expanduser())
        return Routing(f"replayed routing from {replay}", lambda model: replay_trace(model, trace))
    if record is None:
        return OWN_ROUTING
    target = Path(record).expanduser()
    if target.exists() or not target.parent.is_dir():
        raise UsageError(f"{target} exists already, or its folder does not; name another place")

    @contextmanager
    def keep(model: Any) -> Iterator[None]:
        with recording.record(model) as recorder:
            yield
        recorder.trace(f"gangline bench of {name}").save(target)

    return Routing("own", keep)


_CHILD = """
import sys
from gangline.benchmarks.shapes import make_shape
from gangline.cli.loading import torch_dtype
from gangline.cli.progress import byte_bar
from gangline.core.errors import GanglineError
spec, dtype = sys.argv[1:]
try:
    with byte_bar(spec) as progress:
        print(make_shape(spec, dtype=torch_dtype(dtype), progress=progress))
except GanglineError as error:
    print(error)
    sys.exit(1)
"""


def _make(shape: str, budget: BudgetOptions) -> str:
    """Write the random checkpoint of a shape, unless it is there, and return its folder.

    In a process of its own: what writing takes must not count in the memory that is measured here.
    """
    from gangline.benchmarks.shapes import parse_shape

    parse_shape(shape)
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, shape, budget.dtype or "bf16"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if child.returncode:
        raise CheckpointError(child.stdout.strip() or f"writing shape {shape} failed; see above")
    return child.stdout.strip()


def _show(out: Output, report: "SpeedReport") -> None:
    from rich.table import Table

    from gangline.core.sizes import format_size

    bound = report.bound
    budget = "" if report.memory is None else f" of {format_size(report.memory)}"
    peak = "unknown" if report.peak_resident_bytes is None else format_size(report.peak_resident_bytes)
    out.show(report.banner)
    if report.routing != "own":
        out.show(report.routing)
    table = Table(box=None, show_header=False)
    table.add_row("decode", f"{_rate(report.decode)}, {bound.share:.1%} of what the {bound.limit} allows")
    table.add_row("prefill", _rate(report.prefill))
    table.add_row("peak resident", peak + budget)
    for tier, rate in report.hit_rate.items():
        table.add_row(f"found in {tier}", "-" if rate is None else f"{rate:.3f}")
    table.add_row("read per token", format_size(report.miss_bytes_per_token))
    table.add_row(
        "bandwidth",
        f"disk {bound.disk_bandwidth / 1e9:.2f} GB/s ({bound.disk_way}), "
        f"memory {bound.memory_bandwidth / 1e9:.1f} GB/s: the most that was seen",
    )
    out.show(table)


def _rate(spread: "Spread") -> str:
    return f"{spread.median:.2f} tokens/s ({spread.low:.2f} to {spread.high:.2f}, {spread.n} runs)"
