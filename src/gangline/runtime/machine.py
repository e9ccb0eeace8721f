"""What this machine can do, measured once (see ``measure``) and kept: plans predict speed from it.

A profile belongs to one CPU and one disk. It is stored under ``GANGLINE_HOME/machine`` and read back only
where the hardware is still the same.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gangline.core.home import cache_dir

logger = logging.getLogger(__name__)

SCHEMA = 2


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
class RecordSpeed:
    """Reads of whole experts as the store does them, in bytes/s over short windows: disks of shared machines
    swing.

    Attributes:
        nbytes: size of one expert.
        low, median, high: the slowest, the middle and the fastest window.
    """

    nbytes: int
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class ExpertSpeed:
    """Cost of the experts' kernel.

    Attributes:
        codec: format of the weights.
        rows: rows of each expert.
        seconds: per weight of an expert, for all its rows together.
    """

    codec: str
    rows: int
    seconds: float


@dataclass(frozen=True)
class LayerCost:
    """Seconds that a MoE layer costs apart from its weights.

    Attributes:
        layer: one layer of a decoded token: attention glue, norms, router.
        expert: one expert of a decoded token: lease, calls, sum.
        prompt_expert: one expert of a layer while a prompt is read.
    """

    layer: float
    expert: float
    prompt_expert: float


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
        records: reads of whole experts, by size.
        experts: cost of the experts' kernel, by format and rows.
        layer_cost: what a layer costs apart from its weights.
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
    records: tuple[RecordSpeed, ...]
    experts: tuple[ExpertSpeed, ...]
    layer_cost: LayerCost
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
            "records": tuple(RecordSpeed(**point) for point in data["records"]),
            "experts": tuple(ExpertSpeed(**point) for point in data["experts"]),
            "layer_cost": LayerCost(**data["layer_cost"]),
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


def save_profile(profile: MachineProfile) -> None:
    """Store a profile where :func:`load_profile` finds it."""
    file = _file(profile.hardware)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(profile.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


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
