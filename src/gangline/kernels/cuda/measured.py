"""Which is faster for a shape, sparse kernels or decompress-and-dense: what a GPU measured.

The table is ``samoyeds_times.json``, written by ``benchmarks/samoyeds/gpu_layer.py --table``. Nothing is
guessed: where no entry is near, the answer is that nothing is known.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

_TABLE = Path(__file__).with_name("samoyeds_times.json")
# An entry speaks for loads of up to so many times more or fewer tokens an expert.
_REACH = 2.0


@dataclass(frozen=True)
class Timing:
    """One layer, timed both ways.

    Attributes:
        device: the GPU's name.
        codec: of all matrices.
        hidden: D.
        intermediate: F.
        experts: E.
        top_k: experts of a token.
        tokens: T.
        sparse_us: microseconds of the sparse kernels.
        dense_us: microseconds of decoding the experts and dense products.
        wide_us: microseconds of the Hopper kernel; None where it cannot serve.
    """

    device: str
    codec: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    sparse_us: float
    dense_us: float
    wide_us: float | None = None

    @property
    def load(self) -> float:
        """Average tokens of an expert."""
        return self.tokens * self.top_k / self.experts


@cache
def measured_timings(path: Path = _TABLE) -> tuple[Timing, ...]:
    """All entries of the table."""
    return tuple(Timing(**entry) for entry in json.loads(path.read_text()))


def is_measured(timings: Sequence[Timing], device: str, codec: str, sizes: tuple[int, int]) -> bool:
    """Whether a GPU of that name has timed experts of that codec and these sizes (hidden, intermediate)."""
    return any((t.device, t.codec, (t.hidden, t.intermediate)) == (device, codec, sizes) for t in timings)


Way = Literal["sparse", "wide", "dense"]
"""The kernels for every GPU, the one for Hopper, and decompress-and-dense."""


def fastest(
    timings: Sequence[Timing], device: str, codec: str, sizes: tuple[int, int], load: float
) -> Way | None:
    """What won where it was measured nearest, or None if nothing was.

    Args:
        timings: the table.
        device: the GPU's name.
        codec: of the matrices.
        sizes: hidden and intermediate.
        load: average tokens of an expert.
    """
    near = [
        (abs(math.log(timing.load / load)), timing)
        for timing in timings
        if (timing.device, timing.codec) == (device, codec) and (timing.hidden, timing.intermediate) == sizes
    ]
    if not near:
        return None
    distance, best = min(near, key=lambda entry: entry[0])
    if distance > math.log(_REACH):
        return None
    times: dict[Way, float] = {"dense": best.dense_us, "sparse": best.sparse_us}
    if best.wide_us is not None:
        times["wide"] = best.wide_us
    return min(times, key=times.__getitem__)
