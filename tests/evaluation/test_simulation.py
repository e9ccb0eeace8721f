"""The simulator against the live engine: while decoding, the same hits, misses and bytes."""

import pytest
import torch

import gangline
from evaluation.tiny_text import saved_model
from gangline.evaluation.generation import fixed_length
from gangline.evaluation.simulation import (
    SimulationSettings,
    capacity_slots,
    simulate_trace,
)
from gangline.policies.caches import LayerLRU
from gangline.runtime.event_rules import DENSE_PAIRS_PER_EXPERT, RUN_EXPERTS
from gangline.traces import TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.record import record_generation
from gangline.traces.recorder import Recorder
from gangline.traces.simulator import LevelSpec, Setup, SimLink, simulate
from gangline.traces.texts import Item


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tiny model, prompts of one token, and the trace of the answers."""
    folder = saved_model(tmp_path_factory.mktemp("model"), "olmoe", seed=11)
    model = gangline.load(folder, progress=False)
    sizes = [layout.nbytes for layout in model.gangline.catalog.layouts]
    header = describe_recording(model, "tiny", source="generation", expert_bytes=sizes)
    place = tmp_path_factory.mktemp("trace") / "t"
    with TraceWriter(place, header) as writer, fixed_length(model, 20):
        record_generation(model, Recorder(writer), [Item("a", (5,)), Item("b", (9,))], settings={})
    model.gangline.close()
    return folder, open_trace(place)


@pytest.mark.parametrize("slots", [12, 15, 20, 24])
def test_decoding_hits_what_the_simulator_says(recorded, slots):
    folder, trace = recorded
    model = gangline.load(folder, expert_slots=slots, progress=False, policy="layer-lru")
    with fixed_length(model, 20), torch.inference_mode():
        for first in (5, 9):
            model.generate(torch.tensor([[first]]), attention_mask=torch.ones(1, 1, dtype=torch.long))
    live = model.gangline.stats()
    everything = model.gangline.plan.everything_resident
    model.gangline.close()
    header = trace.header
    level = LevelSpec("host", slots, LayerLRU(slots, header.top_k, header.experts), SimLink(), bypass=False)
    options = {"dense_prefetch": DENSE_PAIRS_PER_EXPERT, "run_experts": RUN_EXPERTS}
    run = simulate(Setup(header.geometry, header.expert_bytes, (level,), **options), trace.events())
    hits, misses = run.counters.total("hits"), run.counters.total("misses")
    if everything:  # filled before the first token
        assert (live.host_hits, live.host_misses) == (hits + misses, 0)
        return
    assert (live.host_hits, live.host_misses) == (hits, misses)
    assert live.bytes_read == sum(run.levels[0].link.moved.values())


def test_capacities(recorded):
    _, trace = recorded
    everyone = trace.header.geometry.total_experts
    size = max(trace.header.expert_bytes)
    assert capacity_slots("50%", trace) == everyone // 2
    assert capacity_slots("7", trace) == 7
    assert capacity_slots(f"{size * 5}B", trace) == 5
    assert capacity_slots("rho=2", trace) == 2 * trace.header.geometry.active_experts
    assert capacity_slots("1TiB", trace) == everyone


def test_every_capacity_has_its_policies_and_bounds(recorded):
    _, trace = recorded
    asked = SimulationSettings(("lru", "arc"), ("25%", "50%"), oracles=(2,), link=1e6)
    seen = []
    result = simulate_trace(trace, asked, progress=lambda done, total: seen.append((done, total)))
    names = [row.policy for row in result.rows]
    assert names == ["lru", "arc", "belady-bypass@global", "belady-bypass@global + oracle(2)"] * 2
    assert seen == [(n, 8) for n in range(1, 9)]
    for row in result.rows:
        assert row.seconds >= row.floor_seconds > 0
        assert 0 < row.bound_share <= 1
        assert row.of_belady is None or row.of_belady <= 1
