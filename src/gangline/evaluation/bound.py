"""What the bandwidths of disk and memory allow: the limit beside every measured decoding speed."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from gangline.evaluation.speed_report import Bound

_DEPTH = 4  # reads in flight when the disk is measured


def bandwidths(runtime: Any) -> tuple[float, float]:
    """Return bytes/s of disk and memory, from another process: the peak memory of this one stays its own."""
    code = (
        "import json, pathlib, sys\n"
        "from gangline.runtime.bandwidth import measure_disk, measure_ram\n"
        "file, size, depth, threads = json.loads(sys.argv[1])\n"
        "disk = measure_disk(pathlib.Path(file), size=size, depth=depth, seconds=0.7)\n"
        "print(json.dumps([disk, measure_ram(threads, seconds=0.7)]))\n"
    )
    file = max(runtime.catalog.files, key=lambda path: path.stat().st_size)
    size = max(layout.nbytes for layout in runtime.catalog.layouts)
    request = json.dumps([str(file), min(size, file.stat().st_size), _DEPTH, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-c", code, request], capture_output=True, text=True, check=True)
    disk, ram = json.loads(done.stdout)
    return disk, ram


def decode_bound(
    model: Any, disk_bytes: float, measured: float, measurements: Sequence[tuple[float, float]]
) -> Bound:
    """Return what bandwidth allows for decoding, and the share of it that was reached.

    Args:
        model: the loaded model.
        disk_bytes: read from disk per token.
        measured: tokens/s.
        measurements: of :func:`bandwidths`, right before and right after the run; their mean counts.
    """
    disk, ram = (statistics.fmean(pair) for pair in zip(*measurements, strict=True))
    memory_bytes = active_bytes(model)
    disk_seconds, memory_seconds = disk_bytes / disk, memory_bytes / ram
    limit = 1 / max(disk_seconds, memory_seconds)
    return Bound(
        limit="disk" if disk_seconds > memory_seconds else "memory",
        disk_bytes=disk_bytes,
        memory_bytes=memory_bytes,
        disk_bandwidth=disk,
        memory_bandwidth=ram,
        tokens_per_second=limit,
        share=measured / limit,
    )


def active_bytes(model: Any) -> int:
    """Return the bytes of weights that one decoded token multiplies with.

    Dense weights, without the rows of the input embedding that it does not look up, and its routed experts.
    """
    runtime = model.gangline
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {id(item): item for item in model.parameters() if item.device.type != "meta"}
    if head is None or head.weight is not embedding.weight:
        weights.pop(id(embedding.weight), None)
    dense: int = sum(item.numel() * item.element_size() for item in weights.values())
    routed: int = sum(
        layer.top_k * layout.nbytes
        for layer, layout in zip(runtime.geometry.layers, runtime.catalog.layouts, strict=True)
    )
    return dense + routed
