"""Measure this machine: disk, memory, matrix products, the experts' kernels, what a layer costs besides."""

import contextlib
import logging
import os
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gangline.core.home import cache_dir
from gangline.runtime.bandwidth import measure_disk, measure_ram, scratch_file
from gangline.runtime.calibrate import expert_speeds, layer_cost, typical_seconds
from gangline.runtime.machine import (
    DiskSpeed,
    GemmSpeed,
    MachineProfile,
    RecordSpeed,
    hardware,
    save_profile,
)
from gangline.runtime.read_plan import CHUNK

logger = logging.getLogger(__name__)

DEPTHS = (1, 2, 4, 8)
ROWS = (1, 64, 512)
BLOCK_BYTES = 4 * 2**20  # one read: between an expert of OLMoE in int4 (3.5 MiB) and in bf16 (12 MiB)
RECORDS = (2**20, 4 * 2**20, 12 * 2**20)
STORE_DEPTH = 4  # reads that the store keeps in flight
WINDOWS = 8
_GEMM_SIDE = 2048
_GEMM_POOL_BYTES = 256 * 2**20  # weights are taken in turn from more memory than any cache holds


def measure_machine(
    folder: Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> MachineProfile:
    """Measure the disk that holds ``folder``, the memory and the processor, and store the profile.

    The full measurement takes about forty seconds, the quick one about ten; both write a scratch file
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
    seconds = 0.25 if quick else 1.0
    say(f"disk: random reads of {BLOCK_BYTES // 2**20} MiB in {folder}")
    disk, records = _disk_speeds(folder, seconds)
    say("memory: reads by all cores")
    ram = measure_ram(machine.cores, seconds=seconds)
    say("processor: matrix products")
    gemm = _gemm_speeds(seconds)
    say("processor: experts in every format")
    experts = tuple(expert_speeds(seconds / 8))
    say("processor: a tiny model")
    profile = MachineProfile(
        hardware=machine,
        features=tuple(sorted(name for name, there in cpu_features().items() if there)),
        block=BLOCK_BYTES,
        disk=disk,
        ram=ram,
        records=records,
        gemm=gemm,
        experts=experts,
        layer_cost=layer_cost(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
    )
    save_profile(profile)
    return profile


def _disk_speeds(folder: Path, seconds: float) -> tuple[tuple[DiskSpeed, ...], tuple[RecordSpeed, ...]]:
    with scratch_file(folder) as file:
        direct = _direct_io(file)
        depths = tuple(
            DiskSpeed(
                depth=depth,
                direct=measure_disk(file, size=BLOCK_BYTES, depth=depth, seconds=seconds) if direct else None,
                cached=measure_disk(file, size=BLOCK_BYTES, depth=depth, seconds=seconds, direct=False),
            )
            for depth in DEPTHS
        )
        return depths, _record_speeds(file, 2 * seconds, direct)


def _record_speeds(file: Path, seconds: float, direct: bool) -> tuple[RecordSpeed, ...]:
    found = []
    for nbytes in RECORDS:
        rates = [
            measure_disk(
                file, size=nbytes, chunk=CHUNK, depth=STORE_DEPTH, seconds=seconds / WINDOWS, direct=direct
            )
            for _ in range(WINDOWS)
        ]
        found.append(RecordSpeed(nbytes, min(rates), statistics.median(rates), max(rates)))
    return tuple(found)


def _direct_io(file: Path) -> bool:
    """Whether the file system of ``file`` opens it with O_DIRECT."""
    if not hasattr(os, "O_DIRECT"):
        return False
    with contextlib.suppress(OSError):
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
        return True
    return False


def _gemm_speeds(seconds: float) -> tuple[GemmSpeed, ...]:
    rates = {dtype: _gemm_rates(dtype, seconds) for dtype in (torch.float32, torch.bfloat16)}
    return tuple(
        GemmSpeed(rows=rows, fp32=rates[torch.float32][rows], bf16=rates[torch.bfloat16][rows])
        for rows in ROWS
    )


def _gemm_rates(dtype: Any, seconds: float) -> dict[int, float]:
    """Return floating-point operations/s of ``x @ w.T`` by number of rows of x."""
    weight_bytes = _GEMM_SIDE**2 * dtype.itemsize
    weights = [
        torch.randn(_GEMM_SIDE, _GEMM_SIDE).to(dtype) for _ in range(max(1, _GEMM_POOL_BYTES // weight_bytes))
    ]
    rates = {}
    for rows in ROWS:
        x = torch.randn(rows, _GEMM_SIDE).to(dtype)

        def one(turn: int, x: Any = x) -> None:
            torch.nn.functional.linear(x, weights[turn % len(weights)])

        rates[rows] = 2 * rows * _GEMM_SIDE**2 / typical_seconds(one, seconds / 2)
    return rates
