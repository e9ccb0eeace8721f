"""The band of expected tokens/s: how it moves with the plan and with the machine."""

from dataclasses import replace

import pytest

from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.policies.precision import HobbitPrecision
from gangline.runtime.footprint import Copies, Footprint
from gangline.runtime.machine import (
    DiskSpeed,
    ExpertSpeed,
    GemmSpeed,
    Hardware,
    LayerCost,
    MachineProfile,
    RecordSpeed,
)
from gangline.runtime.planner import PlanRequest, make_plan
from gangline.runtime.speed_model import expected_speed

LAYERS, EXPERTS, TOP_K, WIDTH = 4, 16, 2, 512
PARAMS = 3 * WIDTH * WIDTH

PROFILE = MachineProfile(
    hardware=Hardware("cpu", 2, 1 << 34, "disk"),
    features=(),
    block=1 << 22,
    disk=(DiskSpeed(4, 1e9, 1e9),),
    ram=1e10,
    records=(RecordSpeed(1 << 20, 0.8e9, 1e9, 1.2e9), RecordSpeed(1 << 23, 0.9e9, 1e9, 1.1e9)),
    gemm=(GemmSpeed(1, 4e9, 8e9), GemmSpeed(64, 4e10, 8e10), GemmSpeed(512, 4e10, 8e10)),
    experts=(
        *(ExpertSpeed("bf16", rows, seconds) for rows, seconds in ((1, 1e-9), (16, 2e-9), (64, 6e-9))),
        *(ExpertSpeed("int4g64", rows, seconds) for rows, seconds in ((1, 3e-9), (16, 3e-9), (64, 8e-9))),
    ),
    layer_cost=LayerCost(1e-4, 1e-5, 2e-5),
    date="2026-01-01T00:00:00+00:00",
    quick=False,
)


def footprint(codec="bf16"):
    layer = LayerGeometry(EXPERTS, TOP_K, WIDTH, WIDTH)
    return Footprint(
        dense=1 << 24,
        load_extra=0,
        table=0,
        row_params=1 << 20,
        head_params=1 << 20,
        width=2,
        kv_per_token=0,
        row=0,
        vocab_row=0,
        kernel=0,
        slots=((2 * PARAMS, tuple(range(LAYERS))),),
        experts=LAYERS * EXPERTS * 2 * PARAMS,
        active_experts=LAYERS * TOP_K * 2 * PARAMS,
        geometry=MoEGeometry((layer,) * LAYERS),
        codecs=(codec,),
    )


def speed(slots, codec="bf16", profile=PROFILE):
    size = footprint(codec)
    request = PlanRequest("m", None, "stored", 1024, expert_slots=slots)
    return expected_speed(make_plan(request, size), size, profile)


def test_with_everything_in_memory_only_computing_counts():
    found = speed(LAYERS * EXPERTS)
    # torch's product is the faster one here
    seconds = LAYERS * (TOP_K * (PARAMS * 1e-9 + 1e-5) + 1e-4) + 2 * (1 << 20) * 2.5e-10
    assert found["compute_seconds"] == pytest.approx(seconds)
    low, high = found["decode_tokens_per_second"]
    assert low < 1 / seconds < high
    assert high / low <= 3
    assert found["read_bytes_per_token"] == [0.0, 0.0]
    low, high = found["prefill_tokens_per_second"]
    assert high / low <= 3
    assert found["bound"].startswith("computing")


def test_fewer_slots_and_slower_disks_are_slower():
    slow_disk = replace(PROFILE, records=(RecordSpeed(1 << 20, 1e7, 1e7, 1e7),))
    many, few, slow = speed(48), speed(8), speed(8, profile=slow_disk)
    for end in (0, 1):
        rates = [found["decode_tokens_per_second"][end] for found in (many, few, slow)]
        assert rates == sorted(rates, reverse=True)
    assert slow["bound"].startswith("disk reads")
    assert slow["hit_rate"][0] == pytest.approx((8 - TOP_K) / 64)


def test_the_format_counts_and_unmeasured_ones_take_their_nearest():
    dense, packed = speed(64), speed(64, "int4g64")
    assert packed["compute_seconds"] > dense["compute_seconds"]
    assert speed(64, "int4g32") == packed | {"bound": packed["bound"]}
    assert speed(64, "fp16")["compute_seconds"] == dense["compute_seconds"]


def test_a_prompt_takes_longer_cold():
    cold, warm = (speed(slots)["prefill_tokens_per_second"] for slots in (32, 64))
    assert cold[0] < warm[0]
    assert cold[1] <= warm[1]


def two_precisions(slots, high, low, top_k=TOP_K):
    """The band where misses may be computed in a quarter of the bytes."""
    size = footprint()
    layers = tuple(replace(layer, top_k=top_k) for layer in size.geometry.layers)
    copies = Copies((PARAMS // 2,) * LAYERS, 0.25, ("int4g64",), 0, None, HobbitPrecision(high, low))
    size = replace(
        size,
        geometry=MoEGeometry(layers),
        active_experts=LAYERS * top_k * 2 * PARAMS,
        copies=copies,
    )
    plan = make_plan(PlanRequest("m", None, "stored", 1024, expert_slots=slots), size)
    return plan, expected_speed(plan, size, PROFILE)


def test_two_precisions_read_copies_for_the_lighter_experts():
    plan, found = two_precisions(32, 0.1, 1.0)
    hits, low_slots = found["hit_rate"], plan.low_slots[0][1]
    there = (low_slots - TOP_K) / (LAYERS * EXPERTS), 1 - (1 - low_slots / (LAYERS * EXPERTS)) ** 2.5
    # The heavier one of two experts as it is, the other as a copy.
    for end in (0, 1):
        misses = LAYERS * (1 - hits[end])
        assert found["read_bytes_per_token"][end] == pytest.approx(
            misses * (2 * PARAMS + (1 - there[end]) * PARAMS / 2)
        )
        assert found["low_share"][end] == pytest.approx((1 - hits[end]) / 2)
        assert found["skipped_share"][end] == 0
    _, exact = two_precisions(32, 1.0, 1.0)
    assert exact["low_share"] == [0, 0]
    for end in (0, 1):
        assert exact["read_bytes_per_token"][end] > found["read_bytes_per_token"][end]
    assert exact["decode_tokens_per_second"][0] < found["decode_tokens_per_second"][0]
    assert "low_share" not in speed(32)
    assert "low_share" not in two_precisions(64, 0.1, 1.0)[1]  # all experts are there


def test_the_ends_are_experts_that_weigh_alike_and_not():
    _, found = two_precisions(32, 0.6, 0.9, top_k=8)
    misses = [1 - hit for hit in found["hit_rate"]]
    # Of eight that weigh alike three are low; of weights 1, 1/2, 1/3 ... three are low and two left out.
    assert found["low_share"] == pytest.approx([3 / 8 * misses[0], 3 / 8 * misses[1]])
    assert found["skipped_share"] == pytest.approx([0, 2 / 8 * misses[1]])
