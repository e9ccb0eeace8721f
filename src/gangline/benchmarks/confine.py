"""Run a command under a memory limit and measure it from outside. Linux; limits and cold caches need root.

The limit is a control group, which counts the page cache too: a program that maps its weights is held to
the same bytes as one that reads them into buffers.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.core.errors import UsageError

logger = logging.getLogger(__name__)

CGROUP_ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
REPORT_ENV = "GANGLINE_BENCH_REPORT"
_EXEC_IN_GROUP = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Confined:
    """What was seen of one run.

    Attributes:
        returncode: of the command; negative if a signal ended it (-9: the limit killed it, or a person).
        report: what the command left with ``leave_report``; None if it ended before.
        peak_resident_bytes: largest resident memory of the process (VmHWM), file pages that it maps included.
        peak_group_bytes: largest memory of the group, page cache included; None without a limit.
        seconds: from start to end.
        stderr_tail: the last lines that it wrote to stderr.
    """

    returncode: int
    report: dict[str, Any] | None
    peak_resident_bytes: int
    peak_group_bytes: int | None
    seconds: float
    stderr_tail: str


def run_confined(
    command: Sequence[str],
    *,
    memory: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Confined:
    """Run ``command`` in a group limited to ``memory`` bytes, swap excluded, and wait for it.

    Raises:
        UsageError: the machine does not let us make a limited group.
    """
    with tempfile.TemporaryDirectory() as folder, _group(memory) as group:
        report_path = Path(folder, "report.json")
        stderr_path = Path(folder, "stderr")
        inherited = os.environ | dict(env or {}) | {REPORT_ENV: str(report_path)}
        if group is not None:
            command = ["/bin/sh", "-c", _EXEC_IN_GROUP, str(group / "cgroup.procs"), *command]
        start = time.perf_counter()
        with stderr_path.open("wb") as stderr:
            process = subprocess.Popen(command, env=inherited, stderr=stderr, stdout=stderr)
        try:
            peak = _watch(process, start + timeout if timeout else None)
        finally:
            process.kill()
            returncode = process.wait()
        seconds = time.perf_counter() - start
        return Confined(
            returncode=returncode,
            report=json.loads(report_path.read_text()) if report_path.exists() else None,
            peak_resident_bytes=peak,
            peak_group_bytes=_peak_of_group(group),
            seconds=seconds,
            stderr_tail=stderr_path.read_bytes()[-2000:].decode(errors="replace"),
        )


def leave_report(report: Mapping[str, Any]) -> None:
    """Hand a report to ``run_confined``, or print it where the command runs by hand."""
    path = os.environ.get(REPORT_ENV)
    if path is None:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        Path(path).write_text(json.dumps(report))


def storage_bytes_read() -> int:
    """Bytes that this process made the disk deliver so far: reads, direct reads and mapped pages alike."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def drop_page_cache() -> bool:
    """Empty the page cache and return True; False (with a warning) without the rights to do so."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError as error:
        logger.warning("page cache not dropped (%s); runs start warm", error.strerror)
        return False
    return True


@contextmanager
def read_ahead(path: Path, kib: int | None) -> Iterator[None]:
    """Set the read-ahead of the disk under ``path`` to ``kib`` KiB, then restore it; None changes nothing.

    Raises:
        UsageError: the disk has no such setting or we lack the rights.
    """
    if kib is None:
        yield
        return
    setting = _read_ahead_setting(path)
    try:
        before = setting.read_text()
        setting.write_text(f"{kib}\n")
    except OSError as error:
        raise UsageError(
            f"cannot set the read-ahead of {path} ({error}); run as root or leave it out"
        ) from error
    try:
        yield
    finally:
        setting.write_text(before)


def _read_ahead_setting(path: Path) -> Path:
    device = path.stat().st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")


def _watch(process: subprocess.Popen[bytes], deadline: float | None) -> int:
    """Wait for the end and return the largest VmHWM seen, in bytes. The last look misses 50 ms at most."""
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        for line in _lines(status):
            if line.startswith("VmHWM:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        if deadline is not None and time.perf_counter() > deadline:
            process.kill()
        time.sleep(0.05)
    return peak


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []  # it ended between the two calls


@contextmanager
def _group(memory: int | None) -> Iterator[Path | None]:
    if memory is None:
        yield None
        return
    controller = _controller()
    group = controller / f"gangline-bench-{os.getpid()}"
    if controller == CGROUP_ROOT:
        limits = {"memory.max": memory, "memory.swap.max": 0}
    else:
        limits = {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory}
    try:
        group.mkdir(exist_ok=True)
        for name, value in limits.items():
            # A kernel without swap accounting lacks the second file, and then there is nothing to limit.
            if (group / name).exists() or "sw" not in name:
                (group / name).write_text(str(value))
    except OSError as error:
        raise UsageError(
            f"cannot limit memory through {group} ({error}); run as root, or without a limit"
        ) from error
    try:
        yield group
    finally:
        _remove(group)


def _controller() -> Path:
    # Version 1 mounts each controller in its own folder, version 2 has one tree.
    if (CGROUP_ROOT / "memory").is_dir():
        return CGROUP_ROOT / "memory"
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return CGROUP_ROOT
    raise UsageError("no memory controller under /sys/fs/cgroup; run without a memory limit")


def _peak_of_group(group: Path | None) -> int | None:
    if group is None:
        return None
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return None


def _remove(group: Path) -> None:
    # The kernel refuses while it still lets go of the last process.
    for _ in range(50):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    logger.warning("could not remove %s; remove it by hand", group)
