"""Expected tokens/s from the bytes of a plan and the measured costs of this machine: a band.

A token costs its dense weights and its experts (measured seconds per weight, in the format and at the number
of rows), what layers and experts cost besides, and the reads of experts that are not in memory. Low end:
uniform routing (a cache of x % hits x % of the time), reads and computing one after the other, the disk in
its slowest window. High end: the locality of trained models, reads hidden behind computing, the disk at its
best. Where misses may be computed in low precision, the ends are two assumptions on the routers' weights (see
:mod:`gangline.runtime.mixed_speed`). Nothing is predicted without a measured machine.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gangline.core.sizes import format_size
from gangline.runtime.footprint import Footprint
from gangline.runtime.machine import ExpertSpeed, MachineProfile, load_profile
from gangline.runtime.mixed_speed import Wanted, copy_bytes_per_token, low_share, wanted
from gangline.runtime.planner import MemoryPlan

# A run's computing against the calibration: other programs and colder caches, or quieter ones.
_COMPUTE = (1.5, 0.75)
# A run's reads against the slowest and the fastest window of the measurement, which was short: a shared disk
# changes with the hour.
_READS = (0.7, 1.5)
# Assumed of trained models, whose neighbouring tokens share experts: a share x of the experts in memory
# serves 1 - (1 - x) ** 2.5 of the uses.
_LOCALITY = 2.5
PROMPT_TOKENS = 512


def with_speed(plan: MemoryPlan, footprint: Footprint, profile: MachineProfile | None = None) -> MemoryPlan:
    """Return the plan with ``speed`` filled in, or with a note that the machine has not been measured yet."""
    profile = profile or load_profile()
    if profile is None:
        note = "no tokens/s: this machine has not been measured; run 'gangline doctor' once"
        return replace(plan, notes=(*plan.notes, note))
    return replace(plan, speed=expected_speed(plan, footprint, profile))


def expected_speed(plan: MemoryPlan, footprint: Footprint, profile: MachineProfile) -> dict[str, Any]:
    """Return bands of decode and prefill tokens/s with the bytes behind them.

    Keys: ``decode_tokens_per_second`` and ``prefill_tokens_per_second`` (of the first prompt after loading,
    ``prompt_tokens`` long) as ``[low, high]``, ``hit_rate`` as ``[uniform, local]``, ``read_bytes_per_token``
    and ``disk_bytes_per_second`` likewise, ``compute_seconds`` of a decoded token, ``bound`` in words. In
    two precisions also ``low_share`` and ``skipped_share`` of the experts of a token.
    """
    disk = _disk(profile, _expert_bytes(footprint))
    hits = (_useful(plan, footprint, plan.experts_resident), _local(plan.resident_share))
    parts = wanted(plan, footprint)
    tokens = [_decode_cost(footprint, profile, part, hit) for part, hit in zip(parts, hits, strict=True)]
    token = tokens[0]
    moved = _moved(plan, footprint, hits, parts)
    rows = min(PROMPT_TOKENS, plan.rows)
    cold = 0 if plan.everything_resident else footprint.experts
    decode = _band(tokens, [read / rate for read, rate in zip(moved, disk, strict=True)])
    prompt = _band([_prompt_cost(footprint, profile, rows)] * 2, [cold / rate for rate in disk])
    bound = "disk reads" if moved[0] / math.sqrt(disk[0] * disk[1]) > token.total else "computing"
    return {
        "decode_tokens_per_second": [1 / seconds for seconds in decode],
        "prefill_tokens_per_second": [rows / seconds for seconds in prompt],
        "prompt_tokens": rows,
        "hit_rate": list(hits),
        "read_bytes_per_token": moved,
        "disk_bytes_per_second": list(disk),
        "compute_seconds": token.total,
        "bound": f"{bound}: {format_size(moved[0])} read and {token.total * 1e3:.3g} ms computed per token",
    } | _of_two(plan, hits, parts)


@dataclass(frozen=True)
class _Cost:
    """Seconds of computing: ``experts`` can hide reads behind them, ``rest`` cannot."""

    experts: float
    rest: float

    @property
    def total(self) -> float:
        return self.experts + self.rest


def _band(costs: Sequence[_Cost], reads: Sequence[float]) -> tuple[float, float]:
    """Return the longest and the shortest time, from the computing and the reads of both ends."""
    slow = _COMPUTE[0] * costs[0].total + reads[0]
    fast = _COMPUTE[1] * costs[1].rest + max(_COMPUTE[1] * costs[1].experts, reads[1])
    return slow, fast


def _moved(
    plan: MemoryPlan, footprint: Footprint, hits: Sequence[float], parts: Sequence[Wanted]
) -> list[float]:
    """Return the bytes read for a decoded token at both ends: misses as they are, and copies of others."""
    of_copies = _useful(plan, footprint, low_share(plan) * plan.experts_total), _local(low_share(plan))
    copies = copy_bytes_per_token(footprint)
    return [
        footprint.active_experts * part.high * (1 - hit) + copies * part.computed_low(hit) * (1 - there)
        for hit, part, there in zip(hits, parts, of_copies, strict=True)
    ]


def _of_two(plan: MemoryPlan, hits: Sequence[float], parts: Sequence[Wanted]) -> dict[str, Any]:
    """Return what is expected of the rule of two precisions, at both ends; nothing where there is one."""
    if not plan.low_slots:
        return {}
    both = list(zip(parts, hits, strict=True))
    return {
        "low_share": [part.computed_low(hit) for part, hit in both],
        "skipped_share": [part.skipped(hit) for part, hit in both],
    }


def _decode_cost(footprint: Footprint, profile: MachineProfile, part: Wanted, hit: float) -> _Cost:
    layers = footprint.geometry.layers
    low = part.computed_low(hit)
    high = 1 - low - part.skipped(hit)
    each = high * _expert_seconds(profile, footprint.codecs, 1)
    if low and footprint.copies is not None:
        each += low * _expert_seconds(profile, footprint.copies.codecs, 1)
    weights = sum(layer.top_k * layer.expert_params for layer in layers)
    per_expert = profile.layer_cost.expert * footprint.geometry.active_experts * (high + low)
    dense = (footprint.row_params + footprint.head_params) * _dense_row(profile, footprint.width)
    dense += _packed_cost(footprint, profile, footprint.packed + footprint.packed_head, 1)
    return _Cost(
        experts=weights * each + per_expert,
        rest=dense + profile.layer_cost.layer * len(layers),
    )


def _prompt_cost(footprint: Footprint, profile: MachineProfile, rows: int) -> _Cost:
    """The rows of a prompt fall evenly on the experts of a layer."""
    experts = 0.0
    for layer in footprint.geometry.layers:
        used = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** rows)
        each = _expert_seconds(profile, footprint.codecs, rows * layer.top_k / used)
        experts += used * (layer.expert_params * each + profile.layer_cost.prompt_expert)
    dense = footprint.row_params * _dense_seconds(profile, footprint.width, rows)
    dense += _packed_cost(footprint, profile, footprint.packed, rows)
    return _Cost(experts, dense + profile.layer_cost.layer * len(footprint.geometry.layers))


def _packed_cost(footprint: Footprint, profile: MachineProfile, weights: int, rows: int) -> float:
    """Seconds of packed linear layers, which the experts' kernels compute as well."""
    return weights * _expert_seconds(profile, (footprint.packed_codec,), rows) if weights else 0.0


def _dense_row(profile: MachineProfile, width: int) -> float:
    """Seconds per weight of a dense matrix for one row: of torch's product, or of the faster kernels.

    A decoded token goes through the native core where it knows the model, with the kernels of the experts.
    """
    codec = "bf16" if width == 2 else "fp32"
    return min(_dense_seconds(profile, width, 1), _expert_seconds(profile, (codec,), 1))


def _dense_seconds(profile: MachineProfile, width: int, rows: int) -> float:
    """Seconds per weight of a dense matrix that multiplies so many rows."""
    points = [(at.rows, 2 * at.rows / (at.bf16 if width == 2 else at.fp32)) for at in profile.gemm]
    return _between(points, rows)


def _expert_seconds(profile: MachineProfile, codecs: Sequence[str], rows: float) -> float:
    """Seconds per weight of an expert that has so many rows; the mean where matrices differ in format."""
    costs = []
    for codec in codecs:
        points = [(at.rows, at.seconds) for at in _measured_like(profile.experts, codec)]
        costs.append(_between(points, rows))
    return sum(costs) / len(costs)


def _measured_like(experts: Sequence[ExpertSpeed], codec: str) -> list[ExpertSpeed]:
    """The measurements of a format, or of the one whose bits and family are nearest."""
    from gangline.formats import get_codec

    family, bits = codec.partition(":")[0], get_codec(codec).bits
    names = {at.codec for at in experts}
    nearest = min(
        names,
        key=lambda name: (
            name != codec,
            name.partition(":")[0] != family,
            abs(get_codec(name).bits - bits),
            name,
        ),
    )
    return [at for at in experts if at.codec == nearest]


def _between(points: Sequence[tuple[float, float]], rows: float) -> float:
    """Interpolate the cost between measured numbers of rows; past the last it grows with the rows."""
    points = sorted(points)
    if rows >= points[-1][0]:
        return points[-1][1] * rows / points[-1][0]
    after = max(1, bisect.bisect_left(points, (rows, 0.0)))
    (left, low), (right, high) = points[after - 1], points[after]
    return low + (high - low) * max(0.0, rows - left) / (right - left)


def _disk(profile: MachineProfile, nbytes: float) -> tuple[float, float]:
    """Bytes/s of the slowest and the fastest reads of experts of a size."""
    points = sorted(profile.records, key=lambda at: at.nbytes)
    sizes = [math.log(at.nbytes) for at in points]
    size = min(max(math.log(nbytes), sizes[0]), sizes[-1])
    low = _between(list(zip(sizes, (at.low for at in points), strict=True)), size)
    high = _between(list(zip(sizes, (at.high for at in points), strict=True)), size)
    return _READS[0] * low, _READS[1] * high


def _expert_bytes(footprint: Footprint) -> float:
    return footprint.experts / footprint.geometry.total_experts


def _useful(plan: MemoryPlan, footprint: Footprint, resident: float) -> float:
    """Hit rate under uniform routing: the ring that streams misses holds nothing for good."""
    ring = max(layer.top_k for layer in footprint.geometry.layers)
    if plan.everything_resident:
        return 1.0
    return max(0.0, (resident - ring) / plan.experts_total)


def _local(resident_share: float) -> float:
    """Hit rate with the locality of trained models."""
    return 1 - math.pow(1 - min(1.0, resident_share), _LOCALITY)
