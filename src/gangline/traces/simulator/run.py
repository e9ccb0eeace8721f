"""The simulator: replay routing events through the policy objects that the engine uses.

Discrete events over the device that computes, a CPU pool that may compute misses where they lie, and one
link per tier of slots. Every routing event is atomic: its hits are decided before any of its misses is
admitted. Replaying one access at a time instead inflates recency policies and can invert rankings.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey, low_copy
from gangline.core.precision import Precision
from gangline.traces.simulator.counters import Counters
from gangline.traces.simulator.event_runs import EventRun, EventRuns
from gangline.traces.simulator.level import Level, LevelSpec
from gangline.traces.simulator.machine import SimMachine

if TYPE_CHECKING:
    from gangline.policies.caches import CachePolicy
    from gangline.policies.precision import PrecisionPolicy
    from gangline.policies.predictors import Predictor
    from gangline.policies.prefetch import Prefetcher


class InPlace(Protocol):
    """Chooses which misses the CPU pool computes where they lie, instead of fetching them."""

    def choose(self, event: RoutingEvent, missing: Sequence[int]) -> Sequence[int]:
        """Return some of ``missing``."""


@dataclass(frozen=True)
class Copies:
    """Copies of all experts in low precision, which come over the link of the only tier.

    Attributes:
        rule: says which expert of an event is computed how; events carry what it needs.
        slots: of copies.
        policy: of their slots; it sees layers behind the model's last.
        nbytes: of one copy, for each layer.
    """

    rule: "PrecisionPolicy"
    slots: int
    policy: "CachePolicy"
    nbytes: Sequence[int]


@dataclass(frozen=True)
class Setup:
    """What is simulated.

    Attributes:
        geometry: the model's MoE layers.
        expert_bytes: bytes of one expert, for each layer.
        levels: tiers of slots, fastest first; experts that are in none lie behind the last one's link.
        machine: what computing costs.
        predictors: asked in order; their forecasts go to the caches and to ``prefetcher``.
        prefetcher: turns forecasts into reads; None reads nothing ahead.
        dense_prefetch: as the engine does: a prompt that uses nearly every expert of a layer reads the next
            layer ahead. The number is how many (token, slot) pairs per expert make it so; None switches it
            off.
        run_experts: several tokens: how many experts in a row the engine computes before it gives their
            slots free. One token takes all that are there.
        in_place: which misses the CPU pool computes; needs ``machine.in_place``.
        embed: the model's embeddings ``[T, D]`` of token ids, for predictors that read them.
        copies: experts have copies in low precision, with slots of their own; None if they have none.
    """

    geometry: MoEGeometry
    expert_bytes: Sequence[int]
    levels: Sequence[LevelSpec]
    machine: SimMachine = field(default_factory=SimMachine)
    predictors: Sequence["Predictor"] = ()
    prefetcher: "Prefetcher | None" = None
    dense_prefetch: float | None = None
    run_experts: int = 1
    in_place: InPlace | None = None
    embed: Callable[[Sequence[int]], Any] | None = None
    copies: Copies | None = None


@dataclass
class Run:
    """A finished simulation.

    Attributes:
        counters: see there.
        levels: the tiers as they ended, with their links.
        seconds: modelled time of everything.
    """

    counters: Counters
    levels: list[Level]
    seconds: float


def simulate(setup: Setup, events: Iterable[RoutingEvent]) -> Run:
    """Replay events.

    Args:
        setup: fresh policies, because they keep state.
        events: in the order in which a model makes them: all layers of one pass, then the next pass. Events
            whose ``detail`` names requests also tell the policies where sequences begin and end.

    Raises:
        UsageError: the setup lacks a tier or costs of a CPU pool, or an event does not fit the geometry.
    """
    if not setup.levels:
        raise UsageError("a simulation needs at least one tier of slots")
    if setup.in_place is not None and setup.machine.in_place is None:
        raise UsageError("computing misses in place needs the pool's costs; give machine.in_place")
    if setup.copies is not None and (len(setup.levels) > 1 or setup.in_place is not None):
        raise UsageError("two precisions are simulated with one tier of slots and without a CPU pool")
    simulation = Simulation(setup)
    for event in events:
        simulation.event(event)
    return simulation.finish()


class Simulation:
    """The state of a run: the clock, the slots, what is queued."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.counters = Counters()
        below: Level | None = None
        for spec in reversed(setup.levels):
            below = Level(spec, setup.expert_bytes, below)
        assert below is not None
        self.top = below
        self.low: Level | None = None
        if setup.copies is not None:
            copies, first = setup.copies, setup.levels[0]
            spec = replace(first, slots=copies.slots, policy=copies.policy, bypass=False)
            nbytes = [*setup.expert_bytes, *copies.nbytes]
            self.low = Level(spec, nbytes, None, self.top.link)
        self.step: int | None = None
        self.request: int | None = None
        self.queued: set[ExpertKey] = set()
        self._top_k = max(layer.top_k for layer in setup.geometry.layers)

    def event(self, event: RoutingEvent) -> None:
        """Replay one event."""
        layers = self.setup.geometry.layers
        if event.layer >= len(layers) or (event.experts and event.experts[-1] >= layers[event.layer].experts):
            raise UsageError(
                f"event of layer {event.layer} with experts up to {max(event.experts, default=0)} does not "
                f"fit a model of {len(layers)} MoE layers; simulate with the trace's own header"
            )
        self._boundaries(event)
        start = self.now
        self._compute(self.setup.machine.layer(event.tokens))
        self._drop_stale(event)
        runs = self._one_part(event) if self.low is None else self._two_parts(event, self.low)
        EventRuns(self, event, runs).go()
        self.counters.phases[event.phase].seconds += self.now - start

    def _one_part(self, event: RoutingEvent) -> list[EventRun]:
        """Decide the hits of an event."""
        late, fetched = self._before(self.top, event)
        hits = set(self.top.note(event))
        self.counters.phases[event.phase].count(event, hits, late, fetched)
        return [EventRun(self, self.top, event, hits)]

    def _two_parts(self, event: RoutingEvent, low: Level) -> list[EventRun]:
        """Divide an event as the engine does, and decide the hits of both parts."""
        assert self.setup.copies is not None
        layers = len(self.setup.geometry.layers)
        resident = {}
        for expert in event.experts:
            key = ExpertKey(event.layer, expert)
            if self.top.holds(key):
                resident[expert] = Precision.HIGH
            elif low.holds(low_copy(key, layers)):
                resident[expert] = Precision.LOW
        chosen = self.setup.copies.rule.choose(event, resident)
        counts = self.counters.phases[event.phase]
        counts.note(event)
        counts.skipped += sum(how is Precision.SKIP for how in chosen.values())
        runs = []
        for level, wanted in ((self.top, Precision.HIGH), (low, Precision.LOW)):
            whole = event if level is self.top else replace(event, layer=layers + event.layer)
            mine = [(e, n) for e, n in zip(event.experts, event.counts, strict=True) if chosen[e] is wanted]
            part = replace(whole, experts=tuple(e for e, _ in mine), counts=tuple(n for _, n in mine))
            late, fetched = self._before(level, part)
            hits = set(level.note(part, whole, chosen))
            counts.count_event(part, hits, late, fetched, wanted is Precision.LOW)
            runs.append(EventRun(self, level, part, hits))
        return runs

    def _before(self, level: Level, event: RoutingEvent) -> tuple[int, int]:
        """Return how many experts of an event are still on their way, and how many a prefetch brought."""
        level.link.advance(self.now)
        keys = [ExpertKey(event.layer, expert) for expert in event.experts]
        return sum(level.coming(key) for key in keys), sum(key in level.prefetched for key in keys)

    def level_of(self, key: ExpertKey) -> Level:
        """Return the tier that serves an expert, or a copy in low precision."""
        if self.low is not None and key.layer >= len(self.setup.geometry.layers):
            return self.low
        return self.top

    def holds(self, key: ExpertKey) -> bool:
        """Whether an expert, or a copy, has a slot."""
        return self.level_of(key).holds(key)

    def finish(self) -> Run:
        """End the last pass and sequence."""
        if self.step is not None:
            self._end_step()
            self._end_request()
        levels: list[Level] = []
        level: Level | None = self.top
        while level is not None:
            level.close()
            levels.append(level)
            level = level.below
        if self.low is not None:  # reported as one tier, whose link they share
            self.low.close()
            self.top.evictions += self.low.evictions
            self.top.useful_bytes += self.low.useful_bytes
            self.top.wasted_bytes += self.low.wasted_bytes
        return Run(self.counters, levels, self.now)

    def _compute(self, seconds: float) -> None:
        self.now += seconds
        self.counters.compute_seconds += seconds

    def compute_expert(self, tokens: int) -> None:
        """Let the device compute one expert."""
        self._compute(self.setup.machine.expert(tokens))

    def _boundaries(self, event: RoutingEvent) -> None:
        """Tell policies and predictors where passes and sequences begin and end."""
        if event.step == self.step:
            return
        if self.step is not None:
            self._end_step()
        detail = event.detail
        if detail is not None and detail.requests_T is not None and len(detail.requests_T):
            request = int(detail.requests_T[0])
            if request != self.request:
                if self.request is not None:
                    self._end_request()
                self.request = request
                for level in self._all_levels():
                    level.policy.on_request_start()
        self.step = event.step
        if detail is not None and detail.token_ids_T is not None:
            ids = detail.token_ids_T.tolist()
            embed = self.setup.embed
            x_TD = None
            if embed is not None and any("embeddings" in p.needs for p in self.setup.predictors):
                x_TD = embed(ids)
            self._act([f for p in self.setup.predictors for f in p.on_request(event.step, ids, x_TD)])

    def _end_step(self) -> None:
        assert self.step is not None
        self._act([f for p in self.setup.predictors for f in p.end_step(self.step or 0)])

    def _end_request(self) -> None:
        for level in self._all_levels():
            level.policy.on_request_end()
        for predictor in self.setup.predictors:
            predictor.end_request()

    def _all_levels(self) -> Iterable[Level]:
        level: Level | None = self.top
        while level is not None:
            yield level
            level = level.below
        if self.low is not None:
            yield self.low

    def _drop_stale(self, event: RoutingEvent) -> None:
        """Reads for this layer that its router did not ask for lose their turn."""
        prefetcher = self.setup.prefetcher
        if prefetcher is None or not self.queued:
            return
        stale, self.queued = prefetcher.after_routing(event, self.queued, len(self.setup.geometry.layers))
        for key in stale:
            self.level_of(key).postpone(key, self.now)

    def forecast(self, event: RoutingEvent) -> None:
        """Let the predictors see an event all of whose misses are requested."""
        self._act([f for p in self.setup.predictors for f in p.after_gate(event)])

    def _act(self, forecasts: list[Forecast]) -> None:
        """Hand forecasts to the caches and read ahead what the planner asks for."""
        if not forecasts:
            return
        for level in self._all_levels():
            level.policy.on_forecast(forecasts)
        prefetcher = self.setup.prefetcher
        if prefetcher is None:
            return
        slots = self.top.spec.slots + (0 if self.low is None else self.low.spec.slots)
        room = prefetcher.room(slots, self._top_k, len(self.queued))
        if not room:
            return
        for fetch in prefetcher.plan(forecasts, self.holds, room):
            key = fetch.what(len(self.setup.geometry.layers))
            if not self.holds(key) and self.level_of(key).request(key, fetch.priority, self.now):
                self.queued.add(key)
