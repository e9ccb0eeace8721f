"""``gangline doctor``: what this machine has, what is missing, and how fast it is."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gangline.cli.options import option
from gangline.cli.output import Output
from gangline.cli.state import NOT_PASSED
from gangline.core.errors import UsageError
from gangline.core.home import cache_dir

if TYPE_CHECKING:
    from gangline.cli.health import Line
    from gangline.runtime.machine import MachineProfile


def doctor(
    out: Output,
    folder: Annotated[
        str | None,
        option("--folder", help="Measure the disk that holds this folder. (Default: the cache folder.)"),
    ] = None,
    quick: Annotated[
        bool, option("--quick", help="About ten seconds of measurement instead of forty.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure, and store the result for 'plan'.")
    ] = True,
) -> None:
    """Say what this machine has and lacks, and measure it for plans. Exit code 3 if a line says FAIL."""
    from gangline.cli.health import health
    from gangline.runtime.machine import load_profile
    from gangline.runtime.measure import measure_machine

    place = Path(folder).expanduser() if folder else cache_dir()
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder; name one on the disk to measure")
    lines = []
    for line in health(place):
        lines.append(line)
        out.show(_text(line))
    failed = any(line.status == "FAIL" for line in lines)
    measuring = measure and not failed
    profile = measure_machine(place, quick=quick, progress=out.note) if measuring else load_profile(place)
    for text in _rates(profile):
        out.show(text)
    out.data(
        {
            "ok": not failed,
            "lines": [dataclasses.asdict(line) for line in lines],
            "machine": profile.to_dict() if profile else None,
        }
    )
    if failed:
        raise typer.Exit(NOT_PASSED)


def _text(line: "Line") -> str:
    return f"{line.status:<5} {line.name:<18} {line.detail}"


def _rates(profile: "MachineProfile | None") -> list[str]:
    if profile is None:
        return ["info  speed              not measured yet; run 'gangline doctor'"]
    way, depth, rate = profile.best_disk
    gemm = ", ".join(f"{at.rows} rows {at.fp32 / 1e9:.0f} / {at.bf16 / 1e9:.0f}" for at in profile.gemm)
    rows = " / ".join(str(rows) for rows in sorted({at.rows for at in profile.experts})) + " rows"
    disk = "; ".join(
        f"depth {at.depth}: "
        + ("-" if at.direct is None else f"{at.direct / 1e9:.2f}")
        + f" / {at.cached / 1e9:.2f}"
        for at in profile.disk
    )
    return [
        f"ok    disk               {rate / 1e9:.2f} GB/s ({way}, depth {depth}, {profile.block >> 20} MiB)",
        f"ok    disk, GB/s         direct / cached: {disk}",
        f"ok    memory reads       {profile.ram / 1e9:.1f} GB/s",
        f"ok    matrix products    GFLOP/s in fp32 / bf16: {gemm}",
        f"ok    experts            ns a weight with {rows}: {'; '.join(_expert_cost(profile))}",
        f"ok    layer and expert   {profile.layer_cost.layer * 1e3:.2f} ms and "
        f"{profile.layer_cost.expert * 1e3:.2f} ms a token, apart from their weights",
    ]


def _expert_cost(profile: "MachineProfile") -> list[str]:
    """Return one text per format: the cost of a weight by number of rows."""
    codecs = list(dict.fromkeys(at.codec for at in profile.experts))
    return [
        f"{codec} " + " / ".join(f"{at.seconds * 1e9:.2f}" for at in profile.experts if at.codec == codec)
        for codec in codecs
    ]
