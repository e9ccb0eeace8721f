"""The program ``gangline``."""

import os
from typing import Annotated

import typer

from gangline import __version__
from gangline.cli.cmd_bench import bench
from gangline.cli.cmd_cache import group as cache
from gangline.cli.cmd_chat import chat
from gangline.cli.cmd_check import check
from gangline.cli.cmd_convert import convert
from gangline.cli.cmd_doctor import doctor
from gangline.cli.cmd_plan import plan
from gangline.cli.cmd_predict import group as predict
from gangline.cli.cmd_report import report
from gangline.cli.cmd_run import run
from gangline.cli.cmd_simulate import simulate
from gangline.cli.cmd_sparsify import sparsify
from gangline.cli.cmd_trace import trace
from gangline.cli.cmd_tune import tune
from gangline.cli.command import command
from gangline.cli.group import GanglineGroup

# Idle threads of torch's OpenMP pool spin for milliseconds by default, which takes the cores away from the
# threads that read experts and from other programs. A short spin keeps quiet machines quick. Read when torch
# is loaded, which is later.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    name="gangline",
    cls=GanglineGroup,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Mixture-of-Experts models within the memory you have.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check ran and did not pass, 130 interrupted.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"gangline {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Run Mixture-of-Experts models within the memory you have."""


for body in (doctor, plan, run, chat, check, bench, trace, simulate, tune, report, convert, sparsify):
    command(app, body.__name__)(body)
app.add_typer(cache)
app.add_typer(predict)
