"""One JSON schema for every published number: ``benchmarks/results/NAME.json``.

A result file names the command that made it, the machine and the versions, and holds one row per number,
beside the peer's number and the physical limit measured in the same run.
"""

import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

import gangline
from gangline.core.errors import GanglineError

Kind = Literal["measured", "simulated", "published"]

_KEYS = {"name", "commit", "date", "command", "machine", "versions", "rows"}
_VERSIONS = ("torch", "transformers", "accelerate", "llama-cpp-python", "numpy", "safetensors")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class ResultError(GanglineError):
    """A result does not fit the schema; names the row and the field."""


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        work: what was run, for example ``olmoe-1b-7b bf16, 6GiB, decode``.
        metric: what was measured, with its unit, for example ``tokens/s``.
        ours: our value; None where only the peer could run.
        peer: what it is compared with; None if nothing.
        peer_value: the peer's value in the same unit.
        ratio: above 1 is better than the peer, whichever way the metric points.
        bound_share: our share (0 to 1) of the physical limit measured beside the run.
        n: how many runs the values are medians of.
        spread: largest minus smallest of our values, in the metric's unit.
        kind: whether the numbers were measured here, simulated, or taken from a publication.
    """

    work: str
    metric: str
    ours: float | None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    bound_share: float | None = None
    n: int = 1
    spread: float | None = None
    kind: Kind = "measured"


def compare(
    work: str,
    metric: str,
    ours: Sequence[float],
    peer: str | None = None,
    peer_values: Sequence[float] = (),
    *,
    higher_is_better: bool = True,
    bound_shares: Sequence[float] = (),
) -> Row:
    """Return the row of runs made in turns: medians, and the median of the ratios of the pairs.

    Pairs share the minute in which they ran, so their ratios suffer less from a noisy machine than the
    medians do. Without pairs of equal number the ratio is that of the medians.
    """
    mine = statistics.median(ours) if ours else None
    theirs = statistics.median(peer_values) if peer_values else None
    ratio = None
    if mine is not None and theirs is not None:
        paired = len(ours) == len(peer_values)
        pairs = zip(ours, peer_values, strict=True) if paired else [(mine, theirs)]
        ratio = statistics.median(a / b if higher_is_better else b / a for a, b in pairs)
    return Row(
        work=work,
        metric=metric,
        ours=mine,
        peer=peer,
        peer_value=theirs,
        ratio=ratio,
        bound_share=statistics.median(bound_shares) if bound_shares else None,
        n=len(ours) or len(peer_values),
        spread=max(ours) - min(ours) if len(ours) > 1 else None,
    )


def machine_info() -> dict[str, Any]:
    """Return what a reader needs to judge a speed: processor, cores, memory, system, accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "arch": platform.machine(),
        "gpus": gpus,
    }


def write_result(
    name: str,
    rows: Iterable[Row],
    command: str | None = None,
    *,
    folder: Path = Path("benchmarks/results"),
    machine: dict[str, Any] | None = None,
) -> Path:
    """Write ``folder/NAME.json`` in one step and return its path.

    Args:
        name: of the result: lower-case letters, digits, ``_`` and ``-``.
        rows: at least one.
        command: that makes the result again; by default the running one.
        folder: where results lie, by default in the repository that one stands in.
        machine: what to add to ``machine_info``, for example measured bandwidths.

    Raises:
        ResultError: a row does not fit the schema.
    """
    result = {
        "name": name,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command or running_command(),
        "machine": machine_info() | (machine or {}),
        "versions": _versions(),
        "rows": [asdict(row) for row in rows],
    }
    validate(result)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = folder / f"{name}.{os.getpid()}.partial"
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Return a stored result.

    Raises:
        ResultError: the file is not JSON or does not fit the schema.
    """
    try:
        result = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ResultError(f"{path} cannot be read as a result ({error}); run its benchmark again") from error
    validate(result, str(path))
    return dict(result)


def validate(result: Any, where: str = "result") -> None:
    """Check a result against the schema.

    Raises:
        ResultError: names the first field that does not fit.
    """
    if not isinstance(result, dict) or set(result) != _KEYS:
        raise ResultError(f"{where}: write exactly the keys {', '.join(sorted(_KEYS))}")
    if not isinstance(result["name"], str) or not _NAME.fullmatch(result["name"]):
        raise ResultError(f"{where}: name {result['name']!r} must be lower-case letters, digits, _ and -")
    for key, kind in (
        ("commit", str),
        ("date", str),
        ("command", str),
        ("machine", dict),
        ("versions", dict),
    ):
        if not isinstance(result[key], kind) or not result[key]:
            raise ResultError(f"{where}: {key} must be a non-empty {kind.__name__}")
    if not isinstance(result["rows"], list) or not result["rows"]:
        raise ResultError(f"{where}: rows must be a list with at least one row")
    for number, row in enumerate(result["rows"]):
        _validate_row(row, f"{where}: row {number}")


def _validate_row(row: Any, where: str) -> None:
    names = {field.name for field in fields(Row)}
    if not isinstance(row, dict) or set(row) != names:
        raise ResultError(f"{where}: write exactly the fields {', '.join(sorted(names))}")
    for name in ("work", "metric"):
        if not isinstance(row[name], str) or not row[name]:
            raise ResultError(f"{where}: {name} must be a non-empty text")
    for name in ("ours", "peer_value", "ratio", "bound_share", "spread"):
        _check_number(row[name], f"{where}: {name}")
    if row["ours"] is None and row["peer_value"] is None:
        raise ResultError(f"{where}: neither ours nor peer_value holds a number")
    if (row["peer"] is None) != (row["peer_value"] is None):
        raise ResultError(f"{where}: peer and peer_value must be given together")
    if not isinstance(row["n"], int) or row["n"] < 1:
        raise ResultError(f"{where}: n must be a whole number above zero")
    if row["kind"] not in get_args(Kind):
        raise ResultError(f"{where}: kind {row['kind']!r} must be one of {', '.join(get_args(Kind))}")


def _check_number(value: Any, where: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ResultError(f"{where} must be a finite number or null, not {value!r}")


def running_command(hide: Mapping[str, str] | None = None) -> str:
    """Return the running command as one would type it in the repository.

    Args:
        hide: options whose value is a place on this machine, with the word to show instead, for example
            ``{"--model": "FOLDER"}``.
    """
    script = Path(sys.argv[0])
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    # The path of an installed script is this machine's own business.
    shown = ["python", script.as_posix()] if script.suffix == ".py" else [script.name]
    previous = ""
    for word in sys.argv[1:]:
        shown.append((hide or {}).get(previous, word))
        previous = word
    return shlex.join(shown)


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "src", "csrc", "benchmarks/*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    found = {"gangline": gangline.__version__, "python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()
