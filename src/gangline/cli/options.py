"""The options that several commands share, each defined once.

A command takes a dataclass of this file as a parameter; :mod:`gangline.cli.command` turns its fields into
flags. Every flag ``--some-flag`` can also be given as the variable ``GANGLINE_SOME_FLAG`` or as
``some-flag:`` in the file of ``--config``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from gangline.cli.config import read_config
from gangline.cli.state import set_debug

Precision = Literal["stored", "int8", "int6", "int4", "int3", "int2"]
Dtype = Literal["bf16", "fp16", "fp32"]
InputOutput = Literal["auto", "direct", "cached"]


def variable(flag: str) -> str:
    """Return the environment variable of a long flag: ``--ctx-size`` -> ``GANGLINE_CTX_SIZE``."""
    return "GANGLINE_" + flag.removeprefix("--").replace("-", "_").upper()


def option(*flags: str, help: str, callback: Callable[..., Any] | None = None, **more: Any) -> Any:
    """Return a typer option whose variable follows from its long flag (the first of ``flags``)."""
    return typer.Option(
        *flags, envvar=variable(flags[0]), help=help, callback=callback, show_envvar=False, **more
    )


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .gguf file, a hub id, REPO:FILE.gguf, or 'demo'.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model it is, and in which number formats it computes."""

    precision: Annotated[
        Precision,
        option("--precision", help="Weights as stored (exact), or rounded to so many bits (approximate)."),
    ] = "stored"
    dtype: Annotated[
        Dtype | None, option("--dtype", help="Type of activations and dense weights. (Default: as stored.)")
    ] = None
    revision: Annotated[str | None, option("--revision", help="Branch, tag or commit of a hub model.")] = None


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(ModelOptions):
    """What decides where each byte goes."""

    memory: Annotated[
        str | None,
        option("--memory", help="Peak resident memory, for example 6GiB. (Default: what is free.)"),
    ] = None
    ctx_size: Annotated[
        int | None,
        option("--ctx-size", "-c", help="Tokens of prompt and answer together.", min=1),
    ] = None
    batch_tokens: Annotated[
        int | None,
        option("--batch-tokens", help="Tokens at once; longer prompts are read in chunks.", min=1),
    ] = None
    device: Annotated[
        str | None,
        option(
            "--device",
            metavar="cpu|cuda",
            help="Where sparse experts are computed. (Default: a GPU if measured faster.)",
        ),
    ] = None


PolicyOption = Annotated[
    str | None,
    option(
        "--policy",
        metavar="NAME|FILE.yaml",
        help="What is cached, predicted and read ahead. (Default: as tuned, else 'default'.)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How a loaded model computes; none of it changes which experts run."""

    threads: Annotated[
        int | None, option("--threads", "-t", help="CPU threads. (Default: physical cores.)", min=1)
    ] = None
    seed: Annotated[int, option("--seed", help="Seed of every random choice.")] = 0
    io: Annotated[
        InputOutput,
        option("--io", help="Read experts around the page cache, through it, or as measured best."),
    ] = "auto"
    policy: PolicyOption = None
    predictor: Annotated[
        str | None,
        option(
            "--predictor",
            metavar="FILE",
            help="What the policy learned: a file of 'gangline predict train', or a trace.",
        ),
    ] = None


PredictionMode = Literal["hint", "execute", "mixed"]

ModeOption = Annotated[
    PredictionMode,
    option(
        "--mode",
        help="hint: exact. execute: sida predicts what is computed. mixed: hobbit, in two precisions.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What every command takes."""

    json: Annotated[
        bool, option("--json", help="Print data as JSON on stdout, everything else on stderr.")
    ] = False
    config: Annotated[
        str | None,
        option(
            "--config",
            metavar="FILE",
            help="YAML file, keys spelled as the long flags.",
            callback=read_config,
            is_eager=True,
        ),
    ] = None
    show_config: Annotated[
        bool, option("--show-config", help="Print every setting with its source, and stop.")
    ] = False
    debug: Annotated[
        bool, option("--debug", help="Log everything; show the traceback of an error.", callback=set_debug)
    ] = False
