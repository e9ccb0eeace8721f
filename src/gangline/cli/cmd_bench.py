"""``gangline bench``: speed and memory under a budget, beside what bandwidth allows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gangline.cli.options import BudgetOptions, ComputeOptions, ModeOption, option
from gangline.cli.output import Output
from gangline.core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from gangline.evaluation.compare_speed_peers import PeerName
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
    compare: Annotated[
        list[str],
        option("--compare", metavar="ENGINE", help="In turns with llama.cpp or transformers (repeatable)."),
    ] = [],  # noqa: B006 - typer copies it
    replay: Annotated[
        str | None, option("--replay", metavar="DIR", help="Use the experts of a recorded routing trace.")
    ] = None,
    record: Annotated[
        str | None, option("--record", metavar="DIR", help="Write the routing of all runs as a trace.")
    ] = None,
    mode: ModeOption = "hint",
) -> None:
    """Time prompt reading and decoding; print peak memory, hit rates and the share of the bandwidth bound."""
    if (model is None) == (shape is None):
        raise UsageError("give either MODEL or --shape NAME")
    from gangline.cli.loading import load_arguments
    from gangline.evaluation.speed import SpeedSettings, bench_model

    engines = _engines(compare, replay or record)
    settings = SpeedSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        seed=compute.seed,
        batch=batch,
    )
    routing = _routing(replay, record, model or shape)
    found, arguments = model or _make(str(shape), budget), load_arguments(budget, compute, mode)
    if engines:
        from gangline.evaluation.compare_speed import compare_speed

        report = compare_speed(found, engines, settings, name=model or shape, progress=out.note, **arguments)
    else:
        report = bench_model(
            found, settings, name=model or shape, routing=routing, progress=out.note, **arguments
        )
    out.data(report.to_dict())
    _show(out, report)


def _engines(names: list[str], trace: str | None) -> list["PeerName"]:
    """Return the engines to compare with.

    Raises:
        UsageError: an unknown or missing engine, or a trace, which other engines cannot follow.
    """
    if not names:
        return []
    from gangline.evaluation.compare_speed_llamacpp import require_llama_cpp
    from gangline.evaluation.compare_speed_peers import PEERS

    engines = [engine for engine in PEERS if engine in names]
    unknown = sorted(set(names) - set(engines))
    if unknown:
        raise UsageError(f"cannot compare with {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    if trace is not None:
        raise UsageError("other engines route by themselves: leave --compare out, or --replay and --record")
    if "llama.cpp" in engines:
        require_llama_cpp()
    return engines


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
    return Routing("own", lambda model: recording.record(model, target, str(name)))


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
    if report.peers:
        out.show(_peer_table(report))


def _peer_table(report: "SpeedReport") -> "Table":
    from rich.table import Table

    turns = "all loaded at once" if report.together else "loaded in turns"
    table = Table(
        "", "decode", "gangline is", "share of memory's bound", "prefill", "gangline is",
        title=f"in {report.decode.n} rounds, {turns}", title_justify="left", box=None,
    )  # fmt: skip
    table.add_row(
        "gangline", _figure(report.decode), "", f"{report.bound.share:.1%}", _figure(report.prefill), ""
    )
    for peer in report.peers:
        share = "-" if peer.decode_share is None else f"{peer.decode_share.median:.1%}"
        table.add_row(
            f"{peer.name} {peer.version}, {peer.weights}",
            _figure(peer.decode),
            _ratio(peer.decode_ratio),
            share,
            _figure(peer.prefill),
            _ratio(peer.prefill_ratio),
        )
    return table


def _figure(spread: "Spread") -> str:
    return f"{spread.median:.2f} tokens/s"


def _ratio(spread: "Spread") -> str:
    return f"{spread.median:.2f}x ({spread.low:.2f} to {spread.high:.2f})"


def _rate(spread: "Spread") -> str:
    return f"{spread.median:.2f} tokens/s ({spread.low:.2f} to {spread.high:.2f}, {spread.n} runs)"
