"""The simulator: shared vectors of the offloading survey, and orders that hold on every trace."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.policies.caches import make_cache
from gangline.policies.caches.lru import LRU
from gangline.policies.predictors import Predictor
from gangline.policies.prefetch import Fetch, Prefetcher
from gangline.traces.simulator import (
    Bounds,
    LevelSpec,
    Line,
    Setup,
    SimLink,
    SimMachine,
    belady,
    belady_per_layer,
    distinct_experts,
    fewest_bytes,
    make_report,
    simulate,
)
from traces.made import made_events

BYTES = 1000
CAUSAL = ["layer-lru", "lru", "lfu", "lfru", "fifo", "arc", "random", "moe-infinity", "fate"]


def geometry(layers, experts, top_k):
    return MoEGeometry((LayerGeometry(experts, top_k, 16, 8),) * layers)


def run(events, geo, slots, policy="lru", *, scope="global", quotas=None, bypass=True, **more):
    made = make_cache(policy, slots=slots, geometry=geo, scope=scope, quotas=quotas, events=events)
    level = LevelSpec("host", slots, made, more.pop("link", SimLink()), bypass)
    setup = Setup(geo, (BYTES,) * len(geo.layers), (level,), **more)
    return simulate(setup, events), setup


def hits(*arguments, **more):
    return run(*arguments, **more)[0].counters.total("hits")


STEADY = made_events([[(0, 1)] * 4] * 50)
GEO = geometry(4, 8, 2)


def test_flooding_vector():
    """L=4, k=2, the same experts every token, 50 tokens: 400 accesses."""
    assert hits(STEADY, GEO, 6) == 0
    assert hits(STEADY, GEO, 8) == 392
    assert belady(STEADY, 6, bypass=False).hits == 262
    assert belady(STEADY, 6).hits == 294
    assert hits(STEADY, GEO, 8, scope="layer", quotas=[2] * 4) == 392
    assert hits(STEADY, GEO, 4, scope="layer", quotas=[1] * 4) == 196
    assert hits(STEADY, GEO, 6, "belady") == 262
    assert hits(STEADY, GEO, 6, "belady-bypass") == 294


@st.composite
def made_traces(draw, max_layers=3):
    """Decoding one token at a time, with some locality."""
    layers, experts = draw(st.integers(1, max_layers)), draw(st.integers(3, 8))
    top_k = draw(st.integers(1, min(3, experts - 1)))
    steps = draw(st.integers(1, 25))
    rng = draw(st.randoms(use_true_random=False))
    previous = [rng.sample(range(experts), top_k) for _ in range(layers)]
    tokens = []
    for _ in range(steps):
        previous = [p if rng.random() < 0.4 else rng.sample(range(experts), top_k) for p in previous]
        tokens.append([tuple(p) for p in previous])
    return made_events(tokens), geometry(layers, experts, top_k)


def brute_force(events, slots, bypass):
    """The best of all ways to choose what stays after each event."""
    best = {frozenset(): 0}
    for event in events:
        keys = {ExpertKey(event.layer, e) for e in event.experts}
        following = {}
        for resident, count in best.items():
            value = count + len(keys & resident)
            union = resident | keys
            forced = keys if not bypass and len(keys) <= slots else frozenset()
            size = min(slots, len(union))
            for kept in itertools.combinations(sorted(union), size):
                if forced <= set(kept):
                    state = frozenset(kept)
                    following[state] = max(following.get(state, 0), value)
        best = following
    return max(best.values())


@settings(max_examples=25)
@given(st.data(), st.booleans())
def test_belady_is_the_optimum(data, bypass):
    rng = data.draw(st.randoms(use_true_random=False))
    events = made_events([[tuple(rng.sample(range(4), 2))] * 1 for _ in range(7)])
    slots = data.draw(st.integers(1, 3))
    assert belady(events, slots, bypass=bypass).hits == brute_force(events, slots, bypass)


@settings(max_examples=40)
@given(made_traces(), st.data())
def test_no_policy_beats_belady(made, data):
    events, geo = made
    slots = data.draw(st.integers(len(geo.layers) * geo.layers[0].top_k, geo.total_experts))
    name = data.draw(st.sampled_from([*CAUSAL, "belady", "belady-bypass", "window-oracle"]))
    scope = data.draw(st.sampled_from(["global", "layer"]))
    count = hits(events, geo, slots, name, scope=scope)
    assert count <= belady(events, slots).hits
    assert belady(events, slots, bypass=False).hits <= belady(events, slots).hits


@settings(max_examples=40)
@given(made_traces(), st.data())
def test_belady_global_per_layer_and_causal(made, data):
    events, geo = made
    top_k = geo.layers[0].top_k
    quotas = [data.draw(st.integers(top_k, layer.experts)) for layer in geo.layers]
    slots = sum(quotas)
    name = data.draw(st.sampled_from(["lru", "lfu", "fifo", "arc"]))
    parts = belady_per_layer(events, quotas, bypass=False)
    assert belady(events, slots, bypass=False).hits >= parts.hits
    assert belady(events, slots).hits >= belady_per_layer(events, quotas).hits >= parts.hits
    # Each layer's own pool: a shared one lets a layer use what its neighbours have not filled yet.
    alone = sum(hits([e for e in events if e.layer == n], geo, quota, name) for n, quota in enumerate(quotas))
    assert parts.hits >= alone


@settings(max_examples=40)
@given(made_traces(), st.data())
def test_stack_policies_gain_from_capacity(made, data):
    events, geo = made
    small = data.draw(st.integers(geo.layers[0].top_k, geo.total_experts))
    large = data.draw(st.integers(small, geo.total_experts))
    assert hits(events, geo, small) <= hits(events, geo, large)
    for bypass in (True, False):
        assert belady(events, small, bypass=bypass).hits <= belady(events, large, bypass=bypass).hits


@settings(max_examples=30)
@given(made_traces(), st.data())
def test_lru_inclusion(made, data):
    """At every moment a larger LRU holds what a smaller one holds."""
    events, geo = made
    small = data.draw(st.integers(geo.layers[0].top_k, geo.total_experts - 1))
    for end in range(1, len(events) + 1):
        held = []
        for slots in (small, small + 1):
            done, _ = run(events[:end], geo, slots)
            held.append({k for k in all_keys(geo) if done.levels[0].holds(k)})
        assert held[0] <= held[1]


def all_keys(geo):
    return [ExpertKey(n, e) for n, layer in enumerate(geo.layers) for e in range(layer.experts)]


@settings(max_examples=30)
@given(made_traces(), st.sampled_from([*CAUSAL, "belady", "window-oracle"]))
def test_full_capacity_misses_each_expert_once(made, name):
    events, geo = made
    done, _ = run(events, geo, geo.total_experts, name, scope="layer")
    assert done.counters.total("misses") == distinct_experts(events)
    assert done.levels[0].evictions == 0
    assert belady(events, geo.total_experts).misses == distinct_experts(events)


@settings(max_examples=30)
@given(made_traces(max_layers=1))
def test_capacity_k_leaves_no_choice(made):
    """With k slots and mandatory admission every policy hits what two successive events share."""
    events, geo = made
    overlap = sum(len(set(a.experts) & set(b.experts)) for a, b in itertools.pairwise(events))
    top_k = geo.layers[0].top_k
    for name in ("lru", "lfu", "fifo", "arc", "random", "belady"):
        assert hits(events, geo, top_k, name, scope="layer", quotas=[top_k], bypass=False) == overlap


def prompt(layer, experts, tokens, step=0):
    return RoutingEvent(step, layer, "prefill", tokens, tuple(experts), (1,) * len(tuple(experts)))


@settings(max_examples=30)
@given(made_traces(), st.sampled_from(CAUSAL), st.booleans(), st.data())
def test_bytes_are_misses_and_prefetches(made, name, dense, data):
    """bytes over the link == (misses + prefetches) * S, prompts that stream through few slots included."""
    events, geo = made
    experts = geo.layers[0].experts
    start = [prompt(n, range(experts), 3 * experts, step=-1) for n in range(len(geo.layers))]
    slots = data.draw(st.integers(geo.layers[0].top_k + 1, geo.total_experts))
    options = {"dense_prefetch": 2.0} if dense else {}
    link = SimLink(bytes_per_second=data.draw(st.sampled_from([math.inf, 1e6, 1e3])), chunk_bytes=300)
    machine = SimMachine(Line(0.001, 0.0001), Line(0.002))
    done, _ = run(start + events, geo, slots, name, scope="layer", link=link, machine=machine, **options)
    level, counters = done.levels[0], done.counters
    moved = level.link.moved
    refetched = moved[Priority.DEMAND] - counters.total("misses") * BYTES
    # A prompt larger than the cache may lose a hit before its turn, and reads it again.
    assert refetched >= 0 and (refetched == 0 or slots < geo.total_experts)
    assert moved[Priority.PREFETCH] == level.useful_bytes + level.wasted_bytes
    assert counters.total("events") == len(start + events)
    assert sum(moved.values()) >= fewest_bytes(start + events, slots, [BYTES])
    seconds = sum(counts.seconds for counts in counters.phases.values())
    assert seconds == pytest.approx(done.seconds)
    stalls = sum(counters.stall_seconds.values())
    assert counters.compute_seconds + stalls == pytest.approx(done.seconds)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_event_waits_where_every_slot_is_on_its_way_for_others(scope):
    """A prompt reads ahead what the next layer then does not want: its misses wait for the first of that."""
    geo = geometry(2, 8, 2)
    events = [prompt(0, range(8), 16), prompt(1, (6, 7), 16)]
    link = SimLink(bytes_per_second=1e3, chunk_bytes=300)
    done, _ = run(events, geo, 3, scope=scope, bypass=False, link=link, dense_prefetch=2.0)
    assert done.counters.total("events") == 2
    assert sum(done.levels[0].link.moved.values()) >= 10 * BYTES


def test_time_of_one_miss_and_one_hit():
    """Two passes over one expert: fetch 1 s, compute 0.1 s, then a hit."""
    events = made_events([[(0,)], [(0,)]])
    link = SimLink(bytes_per_second=BYTES, latency=0.25)
    machine = SimMachine(expert=Line(0.1), layer=Line(0.0, 0.01))
    done, setup = run(events, geometry(1, 4, 1), 2, link=link, machine=machine)
    assert done.seconds == pytest.approx(0.01 + 1.25 + 0.1 + 0.01 + 0.1)
    assert done.counters.stall_seconds["demand"] == pytest.approx(1.25)
    report = make_report("lru", setup, done, Bounds(events))
    assert report.floor_seconds == pytest.approx(1.0)
    assert report.bound_share == pytest.approx(1.0 / 1.47)
    assert report.tokens_per_second == pytest.approx(2 / 1.47)


class Oracle(Predictor):
    """Knows the events ``ahead`` of the present one."""

    def __init__(self, events, ahead):
        self.events, self.ahead, self.at = events, ahead, -1

    def after_gate(self, event):
        self.at += 1
        coming = self.events[self.at + 1 : self.at + 1 + self.ahead]
        return [
            Forecast(e.step, e.layer, e.experts, (1.0,) * len(e.experts), number + 1, "oracle")
            for number, e in enumerate(coming)
        ]


class Everything(Prefetcher):
    """Reads all that is forecast."""

    def room(self, slots, top_k, waiting):
        return slots

    def plan(self, forecasts, holds, budget=None):
        keys = [ExpertKey(f.layer, e) for f in forecasts for e in f.experts]
        return [Fetch(key, 1.0) for key in keys if not holds(key)]


@settings(max_examples=25)
@given(made_traces(), st.integers(1, 3))
def test_oracle_prefetch_leaves_only_the_first_event_to_chance(made, ahead):
    """With all slots and time enough every miss but those of the first event is read ahead."""
    events, geo = made
    setup = {"predictors": [Oracle(events, ahead)], "prefetcher": Everything()}
    done, _ = run(events, geo, geo.total_experts, **setup)
    counters, level = done.counters, done.levels[0]
    assert counters.total("misses") == len(events[0].experts)
    assert level.useful_bytes == (distinct_experts(events) - len(events[0].experts)) * BYTES
    assert level.wasted_bytes == 0
    none = run(events, geo, geo.total_experts)[0]
    assert sum(level.link.moved.values()) == sum(none.levels[0].link.moved.values())


def test_demand_waits_for_one_chunk_of_a_prefetch():
    events = made_events([[(0,), (1,)], [(2,), (1,)]])
    geo = geometry(2, 4, 1)

    class Wrong(Predictor):
        def after_gate(self, event):
            return [Forecast(1, 0, (3,), (1.0,), 1, "wrong")] if (event.step, event.layer) == (0, 0) else []

    link = SimLink(bytes_per_second=BYTES, chunk_bytes=100)
    setup = {"predictors": [Wrong()], "prefetcher": Everything()}
    done, _ = run(events, geo, 8, link=link, machine=SimMachine(layer=Line(0.05)), **setup)
    # Layer 1's demand comes 0.05 s after the prefetch began: the rest of its chunk is another 0.05 s.
    assert done.counters.stall_seconds["demand"] == pytest.approx(1 + 1.05 + 1.05)
    assert done.levels[0].wasted_bytes == BYTES


def test_reads_that_came_to_nothing_cost_nothing_if_they_never_begin():
    """A prefetch that its layer did not want waits for everything else, and ends when its slot is needed."""
    events = made_events([[(0,), (1,)], [(2,), (1,)], [(0,), (2,)], [(3,), (0,)]])

    class Wrong(Predictor):
        def after_gate(self, event):
            first = event.layer == 0 and event.step == events[0].step
            return [Forecast(event.step, 1, (3,), (1.0,), 1, "wrong")] if first else []

    for seconds, moved in ((0.0, 0), (0.5, BYTES)):  # with time between layers the read begins
        setup = {"predictors": [Wrong()], "prefetcher": Everything()}
        link, machine = SimLink(bytes_per_second=BYTES), SimMachine(layer=Line(seconds))
        done, _ = run(events, geometry(2, 4, 1), 2, bypass=False, link=link, machine=machine, **setup)
        level = done.levels[0]
        assert not level.holds(ExpertKey(1, 3))
        assert level.link.moved[Priority.PREFETCH] == level.wasted_bytes == moved


@settings(max_examples=30)
@given(made_traces(), st.sampled_from(CAUSAL), st.data())
def test_hits_depend_on_no_clock(made, name, data):
    """However fast link and device are, the same experts have slots when an event comes."""
    events, geo = made
    experts = geo.layers[0].experts
    start = [prompt(n, range(experts), 3 * experts, step=-1) for n in range(len(geo.layers))]
    slots = data.draw(st.integers(2, geo.total_experts))
    found = set()
    for speed, seconds in ((math.inf, 0.0), (1e6, 0.001), (1e3, 0.3), (1e3, 3.0)):
        link = SimLink(bytes_per_second=speed, chunk_bytes=300)
        machine = SimMachine(Line(seconds / 3), Line(seconds))
        setup = {
            "predictors": [Same(len(geo.layers))],
            "prefetcher": Everything(),
            "dense_prefetch": 2.0,
            "run_experts": 2,
        }
        done, _ = run(start + events, geo, slots, name, link=link, machine=machine, bypass=False, **setup)
        found.add((done.counters.total("hits"), done.levels[0].evictions))
    assert len(found) == 1


class Same(Predictor):
    """Says that the next layer will use what this one does."""

    def __init__(self, layers):
        self.layers = layers

    def after_gate(self, event):
        if event.layer + 1 == self.layers:
            return []
        chances = tuple(1.0 for _ in event.experts)
        return [Forecast(event.step, event.layer + 1, event.experts, chances, 1, "same")]


def test_cpu_pool_works_beside_the_device():
    events = made_events([[(0, 1, 2)]])

    class Half:
        def choose(self, event, missing):
            return missing[1:]

    link = SimLink(bytes_per_second=BYTES, contended=0.5)
    machine = SimMachine(expert=Line(0.1), in_place=Line(0.7))
    done, _ = run(events, geometry(1, 4, 3), 4, link=link, machine=machine, in_place=Half())
    assert done.counters.in_place == 2
    assert done.levels[0].link.moved[Priority.DEMAND] == BYTES
    assert done.seconds == pytest.approx(max(1 / 0.5 + 0.1, 2 * 0.7))
    with pytest.raises(UsageError, match="in_place"):
        run(events, geometry(1, 4, 3), 4, in_place=Half())


def test_two_tiers():
    """What the upper tier loses the lower one may still have: the second fetch crosses one link only."""
    events = made_events([[(0,)], [(1,)], [(0,)]])
    geo = geometry(1, 4, 1)
    levels = (
        LevelSpec("gpu", 1, LRU(), SimLink("pcie", bytes_per_second=4 * BYTES)),
        LevelSpec("host", 4, LRU(), SimLink("disk", bytes_per_second=BYTES)),
    )
    done = simulate(Setup(geo, (BYTES,), levels), events)
    gpu, host = done.levels
    assert gpu.link.moved[Priority.DEMAND] == 3 * BYTES
    assert host.link.moved[Priority.DEMAND] == 2 * BYTES
    assert done.seconds == pytest.approx(2 * 1.25 + 0.25)


@settings(max_examples=20)
@given(made_traces(), st.data())
def test_faster_links_and_machines_are_not_slower(made, data):
    events, geo = made
    slots = data.draw(st.integers(geo.layers[0].top_k, geo.total_experts))
    machine = SimMachine(Line(0.001), Line(0.01))

    def seconds(speed, factor=1.0):
        link = SimLink(bytes_per_second=speed)
        return run(events, geo, slots, link=link, machine=machine.scaled(factor))[0].seconds

    assert seconds(1e4) >= seconds(1e5) - 1e-9
    assert seconds(1e4) >= seconds(1e4, 2) - 1e-9


def test_refusals():
    with pytest.raises(UsageError, match="at least 1"):
        run(STEADY, GEO, 0)
    with pytest.raises(UsageError, match="does not fit"):
        run(STEADY, geometry(2, 8, 2), 4)
    with pytest.raises(UsageError, match="above zero"):
        SimLink(bytes_per_second=0)
