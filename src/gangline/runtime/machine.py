"""What this machine can do, measured once and kept: the bandwidths and rates from which plans predict speed.

A profile belongs to one CPU and one disk. It is stored under ``GANGLINE_HOME/machine`` and read back only
where the hardware is still the same.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gangline.core.home import cache_dir
from gangline.runtime.bandwidth import measure_disk, measure_ram, scratch_file

logger = logging.getLogger(__name__)

SCHEMA = 1
DEPTHS = (1, 2, 4, 8)
ROWS = (1, 64, 512)
BLOCK_BYTES = 4 * 2**20  # one read: between an expert of OLMoE in int4 (3.5 MiB) and in bf16 (12 MiB)
_GEMM_SIDE = 2048
_GEMM_POOL_BYTES = 256 * 2**20  # weights are taken in turn from more memory than any cache holds


@dataclass(frozen=True)
class Hardware:
    """What a profile is valid for.

    Attributes:
        cpu: processor name.
        cores: CPUs this process may run on.
        ram: bytes of memory.
        disk: device, file system and size of the disk that was measured.
    """

    cpu: str
    cores: int
    ram: int = field(compare=False)  # a new kernel may keep a little more for itself
    disk: str

    @property
    def key(self) -> str:
        """File name of the profile: a hash of CPU, cores and disk."""
        return hashlib.sha256(f"{self.cpu}|{self.cores}|{self.disk}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class DiskSpeed:
    """Random reads of ``MachineProfile.block`` bytes with ``depth`` in flight, in bytes/s.

    Attributes:
        depth: reads in flight.
        direct: around the page cache; None where the file system cannot.
        cached: through the page cache, pages not in it beforehand.
    """

    depth: int
    direct: float | None
    cached: float


@dataclass(frozen=True)
class GemmSpeed:
    """Floating-point operations/s of dense products of ``rows`` rows, weights streamed from memory."""

    rows: int
    fp32: float
    bf16: float


@dataclass(frozen=True)
class MachineProfile:
    """Measured rates of one machine.

    Attributes:
        hardware: what it was measured on.
        features: instruction set extensions of the processor.
        block: bytes of one disk read.
        disk: one entry per queue depth.
        ram: bytes/s that all cores together read from memory.
        gemm: one entry per number of rows.
        call_overhead: seconds of one call of a torch operation on tiny tensors.
        date: when it was measured (UTC, ISO 8601).
        quick: whether the measurement was the short one.
        schema: version of this record.
    """

    hardware: Hardware
    features: tuple[str, ...]
    block: int
    disk: tuple[DiskSpeed, ...]
    ram: float
    gemm: tuple[GemmSpeed, ...]
    call_overhead: float
    date: str
    quick: bool
    schema: int = SCHEMA

    @property
    def best_disk(self) -> tuple[str, int, float]:
        """The fastest way to read experts: ``("direct" or "cached", depth, bytes/s)``."""
        ways = [("direct", point.depth, point.direct) for point in self.disk if point.direct is not None]
        ways += [("cached", point.depth, point.cached) for point in self.disk]
        return max(ways, key=lambda way: way[2])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MachineProfile":
        """Return the profile that :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError: the data is of another schema.
        """
        fixed = {
            "hardware": Hardware(**data["hardware"]),
            "features": tuple(data["features"]),
            "disk": tuple(DiskSpeed(**point) for point in data["disk"]),
            "gemm": tuple(GemmSpeed(**point) for point in data["gemm"]),
        }
        return cls(**{**data, **fixed})


def hardware(folder: Path | None = None) -> Hardware:
    """Return this machine's hardware, with the disk that holds ``folder`` (default: the cache folder)."""
    import psutil

    return Hardware(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram=psutil.virtual_memory().total,
        disk=_disk_name(folder or cache_dir()),
    )


def measure_machine(
    folder: Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> MachineProfile:
    """Measure the disk that holds ``folder``, the memory and the processor, and store the profile.

    The full measurement takes about half a minute, the quick one about ten seconds; both write a scratch file
    of 1 GiB into ``folder`` (default: the cache folder) and remove it.

    Args:
        folder: a folder on the disk where expert packs will lie.
        quick: shorter measurements, noisier numbers.
        progress: called with the name of each step as it begins.

    Raises:
        UsageError: the folder does not exist or has no room.
    """
    from gangline.kernels.cpu import cpu_features

    folder = folder or cache_dir()
    say = progress or logger.info
    machine = hardware(folder)
    seconds = 0.3 if quick else 1.5
    say(f"disk: random reads of {BLOCK_BYTES // 2**20} MiB in {folder}")
    disk = _disk_speeds(folder, seconds)
    say("memory: reads by all cores")
    ram = measure_ram(machine.cores, seconds=seconds)
    say("processor: matrix products")
    profile = MachineProfile(
        hardware=machine,
        features=tuple(sorted(name for name, there in cpu_features().items() if there)),
        block=BLOCK_BYTES,
        disk=disk,
        ram=ram,
        gemm=_gemm_speeds(seconds),
        call_overhead=_call_overhead(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
    )
    _save(profile)
    return profile


def load_profile(folder: Path | None = None) -> MachineProfile | None:
    """Return the stored profile of this machine and of the disk that holds ``folder``, or None.

    None means that nothing was measured yet, or that it was measured on other hardware or by another version.
    """
    machine = hardware(folder)
    file = _file(machine)
    if not file.is_file():
        return None
    try:
        profile = MachineProfile.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s is not a machine profile of this version; 'gangline doctor' measures again", file)
        return None
    if profile.schema != SCHEMA or profile.hardware != machine:
        logger.info("%s was measured on other hardware; 'gangline doctor' measures again", file)
        return None
    return profile


def _file(machine: Hardware) -> Path:
    return cache_dir("machine") / f"{machine.key}.json"


def _save(profile: MachineProfile) -> None:
    file = _file(profile.hardware)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(profile.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def _disk_speeds(folder: Path, seconds: float) -> tuple[DiskSpeed, ...]:
    with scratch_file(folder) as file:
        direct = _direct_io(file)
        return tuple(
            DiskSpeed(
                depth=depth,
                direct=measure_disk(file, size=BLOCK_BYTES, depth=depth, seconds=seconds) if direct else None,
                cached=measure_disk(file, size=BLOCK_BYTES, depth=depth, seconds=seconds, direct=False),
            )
            for depth in DEPTHS
        )


def _direct_io(file: Path) -> bool:
    """Whether the file system of ``file`` opens it with O_DIRECT."""
    if not hasattr(os, "O_DIRECT"):
        return False
    with contextlib.suppress(OSError):
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
        return True
    return False


def _gemm_speeds(seconds: float) -> tuple[GemmSpeed, ...]:
    import torch

    rates = {dtype: _gemm_rates(dtype, seconds) for dtype in (torch.float32, torch.bfloat16)}
    return tuple(
        GemmSpeed(rows=rows, fp32=rates[torch.float32][rows], bf16=rates[torch.bfloat16][rows])
        for rows in ROWS
    )


def _gemm_rates(dtype: Any, seconds: float) -> dict[int, float]:
    """Return floating-point operations/s of ``x @ w.T`` by number of rows of x."""
    import torch

    weight_bytes = _GEMM_SIDE**2 * dtype.itemsize
    weights = [
        torch.randn(_GEMM_SIDE, _GEMM_SIDE).to(dtype) for _ in range(max(1, _GEMM_POOL_BYTES // weight_bytes))
    ]
    rates = {}
    for rows in ROWS:
        x = torch.randn(rows, _GEMM_SIDE).to(dtype)

        def one(turn: int, x: Any = x) -> None:
            torch.nn.functional.linear(x, weights[turn % len(weights)])

        rates[rows] = 2 * rows * _GEMM_SIDE**2 / _median_seconds(one, seconds / 2)
    return rates


def _call_overhead() -> float:
    import torch

    x, w = torch.randn(1, 16), torch.randn(16, 16)

    def hundred(_: int) -> None:
        for _ in range(100):
            torch.nn.functional.linear(x, w)

    return _median_seconds(hundred, 0.05) / 100


def _median_seconds(call: Callable[[int], None], seconds: float) -> float:
    """Return the median duration of ``call(turn)``, called for about ``seconds`` and at least five times."""
    import torch

    times: list[float] = []
    with torch.inference_mode():
        call(0)
        end = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            call(len(times))
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _disk_name(folder: Path) -> str:
    """Return device, file system and size of the disk that holds ``folder``."""
    import psutil

    folder = folder.resolve()
    best = None
    for part in psutil.disk_partitions(all=True):
        mount = Path(part.mountpoint)
        if folder.is_relative_to(mount) and (
            best is None or len(mount.parts) > len(Path(best.mountpoint).parts)
        ):
            best = part
    size = psutil.disk_usage(str(folder)).total
    return f"{best.device} {best.fstype} {size}" if best is not None else f"unknown {size}"
