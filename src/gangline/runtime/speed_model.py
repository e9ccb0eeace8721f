"""Expected tokens/s from bytes and measured bandwidths: a band, because routing decides what is read.

Low end: uniform routing (a cache of x % hits x % of the time) and every cost in sequence. High end: the
locality of trained models and reads hidden behind computing. Nothing is predicted without a measured machine.
"""

from dataclasses import replace
from typing import Any

from gangline.core.sizes import format_size
from gangline.runtime.footprint import Footprint
from gangline.runtime.machine import MachineProfile, load_profile
from gangline.runtime.planner import MemoryPlan

# Small operations per layer outside the large products (norms, rotary, attention glue, router, cache), per
# token.
_OPS_PER_LAYER = 90
_OPS_PER_EXPERT = 12
# torch's products of one row reach this share of the memory bandwidth (half of it in the worst case seen).
_STREAM_SHARE = (0.25, 0.9)
# Share of a machine's product rate that a prompt reaches: an expert sees few rows at a time.
_GEMM_SHARE = (0.08, 0.9)
# Disks of shared machines move by this much between the measurement and the run.
_DISK_SHARE = (0.35, 1.15)
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

    Keys: ``decode_tokens_per_second`` and ``prefill_tokens_per_second`` as ``[low, high]``, ``hit_rate`` as
    ``[uniform, local]``, ``prompt_tokens`` of the prefill, ``read_bytes_per_token``, ``bound`` in words.
    """
    _, _, disk = profile.best_disk
    share = min(1.0, plan.resident_share)
    hits = (_useful(plan, footprint, share), 1 - (1 - share) ** 2.5)
    moved = [footprint.active_experts * (1 - hit) for hit in hits]
    streamed = footprint.dense + footprint.active_experts
    overhead = profile.call_overhead * (
        _OPS_PER_LAYER * len(footprint.geometry.layers) + _OPS_PER_EXPERT * footprint.geometry.active_experts
    )
    slow = moved[0] / (_DISK_SHARE[0] * disk) + streamed / (_STREAM_SHARE[0] * profile.ram) + 3 * overhead
    fast = max(moved[1] / (_DISK_SHARE[1] * disk), streamed / (_STREAM_SHARE[1] * profile.ram)) + overhead / 3
    prefill = _prefill(plan, footprint, profile, disk)
    bound = "disk reads" if moved[0] / disk > streamed / profile.ram else "memory bandwidth"
    return {
        "decode_tokens_per_second": [1 / slow, 1 / fast],
        "prefill_tokens_per_second": prefill,
        "prompt_tokens": min(PROMPT_TOKENS, plan.rows),
        "hit_rate": list(hits),
        "read_bytes_per_token": moved,
        "disk_bytes_per_second": disk,
        "ram_bytes_per_second": profile.ram,
        "bound": f"{bound}: {format_size(moved[0])} read and {format_size(streamed)} streamed per token",
    }


def _useful(plan: MemoryPlan, footprint: Footprint, share: float) -> float:
    """Hit rate under uniform routing: the ring that streams misses holds nothing for good."""
    ring = max(layer.top_k for layer in footprint.geometry.layers)
    if plan.everything_resident:
        return 1.0
    return max(0.0, (plan.experts_resident - ring) / plan.experts_total) if share else 0.0


def _prefill(plan: MemoryPlan, footprint: Footprint, profile: MachineProfile, disk: float) -> list[float]:
    """A prompt reads every expert that is not resident once (all of them if none is yet), and computes its
    rows.
    """
    rows = min(PROMPT_TOKENS, plan.rows)
    active = sum(layer.top_k * layer.expert_params for layer in footprint.geometry.layers)
    flops = 2 * rows * (active + footprint.row_params)
    rate = max(max(point.bf16, point.fp32) for point in profile.gemm)
    warm = footprint.experts * (1 - min(1.0, plan.resident_share))
    slow = footprint.experts / (_DISK_SHARE[0] * disk) + flops / (_GEMM_SHARE[0] * rate)
    fast = max(warm / (_DISK_SHARE[1] * disk), flops / (_GEMM_SHARE[1] * rate))
    return [rows / slow, rows / fast]
