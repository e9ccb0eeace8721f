"""``gangline report``: statistics and pictures of recorded routing on one page."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gangline.cli.options import ModelOptions, option
from gangline.cli.output import Output
from gangline.core.errors import GanglineError, UsageError
from gangline.core.sizes import parse_size

if TYPE_CHECKING:
    from gangline.reports.build import Report
    from gangline.reports.study import Study
    from gangline.traces import Trace
    from gangline.traces.expert_outputs import ExpertOutputs

Progress = Callable[[int, int], None]

_CAPACITIES = ("rho=1", "rho=2", "rho=3", "10%", "25%", "50%", "75%", "90%")
_POLICIES = ("lru@global", "lru", "lfu", "layer-lru")
_WHAT_IF = ("25%", "50%", "75%")
_MEASURED_DOCUMENTS = 12


@dataclass(frozen=True)
class _Costs:
    """What was given on the command line: bytes/s of links, seconds of an expert and between layers."""

    links: list[float]
    expert_seconds: float | None
    layer_seconds: float | None


# Bytes per second of links that people have: a SATA SSD, an NVMe SSD, PCIe 4.0 x4.
_LINKS = (0.5e9, 2e9, 7e9)


def report(
    out: Output,
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Folders that 'gangline trace' wrote, of one model; several checkpoints oldest first.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            metavar="DIR|FILE.html",
            help="Where to write. (Default: report; with --json nowhere.)",
        ),
    ] = None,
    group: Annotated[
        str | None, option("--group", metavar="KIND", help="Label that parts the texts, or 'trace'.")
    ] = None,
    tokens: Annotated[int, option("--tokens", help="Tokens that statistics look at.", min=1)] = 16384,
    sim_tokens: Annotated[
        int, option("--sim-tokens", help="Tokens replayed through caches; 0 simulates nothing.", min=0)
    ] = 1024,
    link: Annotated[
        list[str],
        option(
            "--link",
            help="Bytes per second that bring experts, as 1.5GB; repeat. (Default: measured; 0.5, 2, 7GB.)",
        ),
    ] = [],  # noqa: B006 - typer copies it
    compute_us: Annotated[
        float | None,
        option("--compute-us", help="Microseconds of one expert. (Default: its bytes at memory speed.)"),
    ] = None,
    layer_us: Annotated[
        float | None,
        option("--layer-us", help="Microseconds between two MoE layers. (Default: as measured, else 0.)"),
    ] = None,
    outputs: Annotated[
        bool,
        option("--outputs", help="Load the model of the trace and measure expert outputs (super experts)."),
    ] = False,
    seed: Annotated[int, option("--seed", help="Seed of every random choice.")] = 0,
) -> None:
    """Show recorded routing on one offline page: load, affinity, locality, caches, each beside chance."""
    from gangline.reports.figure import require_matplotlib
    from gangline.reports.study import open_study
    from gangline.reports.write import check_place, plain

    place = Path("report") if output is None and not out.json else output
    if place is not None:
        require_matplotlib()
        check_place(place)
    costs = _Costs([float(parse_size(text)) for text in link], _seconds(compute_us), _seconds(layer_us))
    study = open_study(traces, group=group, tokens=tokens, seed=seed)
    study.words = _words(study)
    if outputs:
        study.outputs = _measure(study, traces[-1])
    made, files = _made(study, sim_tokens, costs, place)
    out.data(plain({**made.to_dict(), "files": [str(path) for path in files]}))
    _show(out, made, files)


def _made(study: "Study", sim_tokens: int, costs: _Costs, place: Path | None) -> tuple["Report", list[Path]]:
    """Simulate, count and draw, each under a bar."""
    from gangline.reports.build import build_report
    from gangline.reports.write import write_report

    if study.trace is not None and sim_tokens:
        with _bar("simulating", "run") as progress:
            study.simulations = _simulations(study, sim_tokens, costs, progress)
    with _bar("counting", "section") as progress:
        made = build_report(study, progress)
    if place is None:
        return made, []
    with _bar("drawing", "picture") as progress:
        return made, write_report(made, place, progress)


def _seconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else microseconds * 1e-6


def _simulations(study: "Study", tokens: int, costs: _Costs, progress: Progress) -> list[Mapping[str, Any]]:
    """The curve of hit rates first, then the other links."""
    from gangline.evaluation.simulation import SimulationSettings, simulate_trace
    from gangline.reports.study import sample
    from gangline.runtime.machine import load_profile

    profile = load_profile()
    measured = [] if profile is None else [profile.best_disk[2]]
    links = costs.links or [*measured, *_LINKS]
    layer_seconds = costs.layer_seconds
    if layer_seconds is None:
        layer_seconds = 0.0 if profile is None else profile.layer_cost.layer
    trace = _replayed(sample(study.rows, study.group_kind, tokens), tokens)
    made: list[Mapping[str, Any]] = []
    for number, speed in enumerate(links):
        settings = SimulationSettings(
            policies=_POLICIES if number == 0 else _POLICIES[-1:],
            capacities=_distinct(trace, _CAPACITIES if number == 0 else _WHAT_IF),
            replay="tokens",
            link=speed,
            expert_seconds=costs.expert_seconds,
            layer_seconds=layer_seconds,
            oracles=(),
        )
        result = simulate_trace(trace, settings, progress if number == 0 else None)
        made.append(result.to_dict() | {"assumed_link": speed not in measured})
    return made


def _replayed(trace: "Trace", tokens: int) -> "Trace":
    """The first tokens, if one document alone is longer."""
    return trace if len(trace) <= tokens else trace.select(rows=[row < tokens for row in range(len(trace))])


def _distinct(trace: "Trace", capacities: tuple[str, ...]) -> tuple[str, ...]:
    from gangline.evaluation.simulation import capacity_slots

    geometry = trace.header.geometry
    usable = [
        text for text in capacities if "%" not in text or geometry.total_experts * float(text[:-1]) >= 100
    ]
    slots = {capacity_slots(text, trace): text for text in reversed(usable)}
    return tuple(text for count, text in sorted(slots.items()) if count < geometry.total_experts)


def _words(study: "Study") -> Callable[[int], str] | None:
    """How to show a token, if the tokenizer that made the trace is at hand; nothing is fetched."""
    from gangline.cli.loading import tokenizer_at_hand
    from gangline.traces.describe import vocabulary_digest

    if study.header.tokenizer_sha256 is None:
        return None
    try:
        tokenizer = tokenizer_at_hand(study.header.model, ModelOptions(revision=study.header.revision))
    except GanglineError as error:
        study.notes.append(f"Tokens are shown by number: {error}.")
        return None
    if tokenizer is None or vocabulary_digest(tokenizer) != study.header.tokenizer_sha256:
        return None
    return lambda token: str(tokenizer.decode([token]))


def _measure(study: "Study", folder: Path) -> "ExpertOutputs":
    """Run some documents of the trace through the plain model; the result is kept beside the trace."""
    from gangline.evaluation.plain import find_checkpoint, load_plain, no_room_for_plain
    from gangline.runtime.opened import open_model
    from gangline.traces.expert_outputs import measure_expert_outputs

    if study.trace is None or (study.rows.tokens.input_id < 0).all():
        raise UsageError("--outputs needs the tokens of the trace; record it with --mode ids or full")
    checkpoint = find_checkpoint(study.header.model, study.header.revision)
    opened = open_model(checkpoint, None)
    missing = no_room_for_plain(opened.cls, opened.config, opened.dtype)
    if missing is not None:
        raise UsageError(f"--outputs: the plain model {missing}; leave the option out")
    ids, doc_R = study.rows.tokens.input_id, study.doc_R
    picked = range(min(_MEASURED_DOCUMENTS, int(doc_R.max()) + 1))
    model = load_plain(checkpoint, opened.cls, opened.config, opened.dtype)
    found = measure_expert_outputs(model, [ids[doc_R == doc].tolist() for doc in picked])
    found.save(folder)
    return found


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, disable=None) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


def _show(out: Output, made: "Report", files: list[Path]) -> None:
    from rich.table import Table

    table = Table("question", "answer", box=None, show_lines=False, padding=(0, 2, 1, 0))
    for section in made.sections:
        table.add_row(section.title, section.says or f"(not recorded) {' '.join(section.lacks)}")
    out.show(table)
    if files:
        more = f", {len(files) - 1} more files beside it" if len(files) > 1 else ""
        out.show(f"{files[0]}{more}")
