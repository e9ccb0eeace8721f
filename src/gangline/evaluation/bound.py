"""What the bandwidths of disk and memory allow: the limit beside every measured decoding speed."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gangline.evaluation.speed_report import Bound, Spread
from gangline.evaluation.speed_run import Sample

_CHILD = """
import json, pathlib, sys
from gangline.runtime.best_bandwidth import best_disk, best_ram
files, record, threads, disk = json.loads(sys.argv[1])
ram = best_ram(threads)
peak = best_disk([pathlib.Path(file) for file in files], record) if disk else None
print(json.dumps([ram, peak and peak.rate, peak and peak.way]))
"""


@dataclass(frozen=True)
class Bandwidths:
    """The most that was seen at one moment, in bytes/s; ``disk`` None where it was not measured."""

    memory: float
    disk: float | None = None
    disk_way: str | None = None


@dataclass(frozen=True)
class Weights:
    """What a decoding step reads of a model.

    Attributes:
        dense: bytes that every step reads.
        routed: bytes of the experts of one token over all layers.
        expert: mean bytes of one expert.
        spread: bytes of the experts of one token, and all of them, per layer.
        files: where experts are read from disk.
        record: bytes of the largest expert.
    """

    dense: int
    routed: int
    expert: float
    spread: tuple[tuple[int, int], ...]
    files: tuple[str, ...]
    record: int

    def step_bytes(self, batch: int, experts_found: float) -> float:
        """Return the bytes that one step of ``batch`` sequences reads from memory.

        Args:
            batch: sequences.
            experts_found: different experts that a step used, as counted; 0 where nobody counted, then what
                even routing would use.
        """
        if batch == 1:
            return self.dense + self.routed
        if experts_found:
            return self.dense + experts_found * self.expert
        return self.dense + sum(whole * (1 - (1 - one / whole) ** batch) for one, whole in self.spread)


def bandwidths(weights: Weights, threads: int, *, disk: bool) -> Bandwidths:
    """Measure now, in another process: the peak memory of this one stays its own.

    Args:
        weights: names the files and the size of a record.
        threads: that read memory.
        disk: whether to measure the disk too.
    """
    request = json.dumps([weights.files, weights.record, threads, disk])
    done = subprocess.run([sys.executable, "-c", _CHILD, request], capture_output=True, text=True, check=True)
    return Bandwidths(*json.loads(done.stdout))


def weights_of(model: Any) -> Weights:
    """Return what a decoding step of a loaded model reads.

    Dense weights are counted without the rows of the input embedding that a token does not look up, and
    experts on a GPU not at all: this machine's memory is what is measured.
    """
    runtime = model.gangline
    pairs = list(zip(runtime.geometry.layers, runtime.catalog.layouts, strict=True))
    here = [] if runtime.gpu is not None else pairs
    routed = sum(layer.top_k * layout.nbytes for layer, layout in here)
    sizes = {Path(path).absolute(): path.stat().st_size for path in runtime.catalog.files}
    record = min(max(layout.nbytes for _, layout in pairs), max(sizes.values()))
    return Weights(
        dense=_dense_bytes(model),
        routed=routed,
        expert=routed / sum(layer.top_k for layer, _ in pairs),
        spread=tuple((layer.top_k * item.nbytes, layer.experts * item.nbytes) for layer, item in here),
        files=tuple(str(path) for path, size in sizes.items() if size >= record),
        record=record,
    )


def _dense_bytes(model: Any) -> int:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Packed matrices are buffers of bytes.
    held = [*model.parameters(), *(item for item in model.buffers() if item.dtype == torch.uint8)]
    weights = {id(item): item for item in held if item.device.type != "meta"}
    # Not head.weight: a packed head would decode all of it.
    if head is None or head._parameters.get("weight") is not embedding.weight:
        weights.pop(id(embedding.weight), None)
    return sum(item.numel() * item.element_size() for item in weights.values())


def decode_bound(
    weights: Weights,
    samples: Sequence[Sample],
    steps: int,
    batch: int,
    beside: Sequence[tuple[Bandwidths, Bandwidths]],
) -> Bound:
    """Return what bandwidth allows for decoding, and the share of it that was reached.

    Args:
        weights: of the model.
        samples: the timed runs.
        steps: decoding steps of each.
        batch: sequences that a step decodes.
        beside: bandwidths right before and right after each run; at least one with the disk's.
    """
    everything = [item for pair in beside for item in pair]
    disk, way = max((item.disk, item.disk_way) for item in everything if item.disk is not None)
    memory = max(item.memory for item in everything)
    disk_bytes = [sample.bytes_read / steps for sample in samples]
    memory_bytes = [weights.step_bytes(batch, (sample.hits + sample.misses) / steps) for sample in samples]
    shares = [
        max(read / disk, touched / max(before.memory, after.memory)) * steps / sample.decode_seconds
        for sample, read, touched, (before, after) in zip(
            samples, disk_bytes, memory_bytes, beside, strict=True
        )
    ]
    read, touched = statistics.median(disk_bytes), statistics.median(memory_bytes)
    return Bound(
        limit="disk" if read / disk > touched / memory else "memory",
        disk_bytes=read / batch,
        memory_bytes=touched / batch,
        disk_bandwidth=disk,
        disk_way=str(way),
        memory_bandwidth=memory,
        tokens_per_second=batch / max(read / disk, touched / memory),
        share=statistics.median(shares),
        shares=Spread.of(shares),
    )
