"""The simulator: replay routing events through the policy objects that the engine uses.

Discrete events over the device that computes, a CPU pool that may compute misses where they lie, and one
link per tier of slots. Every routing event is atomic: its hits are decided before any of its misses is
admitted. Replaying one access at a time instead inflates recency policies and can invert rankings.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.traces.simulator.counters import Counters
from gangline.traces.simulator.level import Level, LevelSpec
from gangline.traces.simulator.link import Transfer
from gangline.traces.simulator.machine import SimMachine

if TYPE_CHECKING:
    from gangline.policies.predictors import Predictor
    from gangline.policies.prefetch import Prefetcher


class InPlace(Protocol):
    """Chooses which misses the CPU pool computes where they lie, instead of fetching them."""

    def choose(self, event: RoutingEvent, missing: Sequence[int]) -> Sequence[int]:
        """Return some of ``missing``."""


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
    simulation = _Simulation(setup)
    for event in events:
        simulation.event(event)
    return simulation.finish()


class _Simulation:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.counters = Counters()
        below: Level | None = None
        for spec in reversed(setup.levels):
            below = Level(spec, setup.expert_bytes, below)
        assert below is not None
        self.top = below
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
        late = sum(self._late(ExpertKey(event.layer, e)) for e in event.experts)
        fetched = sum(ExpertKey(event.layer, e) in self.top.prefetched for e in event.experts)
        hits = set(self.top.note(event))
        counts = self.counters.phases[event.phase]
        counts.count(event, hits, late, fetched)
        _EventRun(self, event, hits).go()
        counts.seconds += self.now - start

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
        return Run(self.counters, levels, self.now)

    def _late(self, key: ExpertKey) -> bool:
        self.top.link.advance(self.now)
        return self.top.coming(key)

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

    def _drop_stale(self, event: RoutingEvent) -> None:
        """Reads for this layer that its router did not ask for lose their turn."""
        prefetcher = self.setup.prefetcher
        if prefetcher is None or not self.queued:
            return
        for key in prefetcher.stale(event, self.queued):
            self.top.postpone(key, self.now)
        self.queued = {key for key in self.queued if key.layer != event.layer}

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
        room = prefetcher.room(self.top.spec.slots, self._top_k, len(self.queued))
        if not room:
            return
        for fetch in prefetcher.plan(forecasts, self.top.holds, room):
            if not self.top.holds(fetch.key) and self.top.request(fetch.key, fetch.priority, self.now):
                self.queued.add(fetch.key)


@dataclass
class _EventRun:
    """The experts of one event, computed as their bytes come; mirrors the engine's lease of an event.

    A single token takes hits first and misses as they arrive. Several tokens take experts in ascending id,
    which streams a prompt through few slots; hits that come later are spared.
    """

    simulation: _Simulation
    event: RoutingEvent
    hits: set[int]
    waiting: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    spared: set[int] = field(default_factory=set)
    slotless: dict[int, Transfer] = field(default_factory=dict)
    pool_done: float = 0.0
    told: bool = False

    def go(self) -> None:
        """Compute all experts of the event."""
        simulation, event = self.simulation, self.event
        counts = dict(zip(event.experts, event.counts, strict=True))
        in_order = event.tokens > 1
        in_place = self._in_place(counts)
        self.missing = [e for e in event.experts if e not in in_place]
        if in_order:
            self.spared = self.hits.copy()
        else:
            self.missing = [e for e in self.missing if e not in self.hits]
            for expert in sorted(self.hits):
                self._hold(expert)
        self._request_missing()
        self._tell()
        while self.waiting or self.missing or self.slotless:
            experts = self._take_ready(in_order)
            self._tell()
            for expert in experts:
                simulation.compute_expert(counts[expert])
            for expert in experts:
                if expert in self.slotless:
                    del self.slotless[expert]
                else:
                    simulation.top.release(ExpertKey(event.layer, expert))
            self._request_missing()
            self._read_next_layer()
        if self.pool_done > simulation.now:
            self._stall("in_place", self.pool_done)
        simulation.top.link.slow = False

    def _tell(self) -> None:
        """Let predictors see the event once all its misses are requested, so that no prefetch delays one."""
        if not self.told and not self.missing:
            self.told = True
            self.simulation.forecast(self.event)

    def _in_place(self, counts: dict[int, int]) -> set[int]:
        """Hand some misses to the CPU pool, which works beside the device."""
        simulation = self.simulation
        chooser, cost = simulation.setup.in_place, simulation.setup.machine.in_place
        missing = [expert for expert in self.event.experts if expert not in self.hits]
        if chooser is None or cost is None or not missing:
            return set()
        chosen = set(chooser.choose(self.event, missing)).intersection(missing)
        if chosen:
            self.pool_done = simulation.now + sum(cost(counts[expert]) for expert in chosen)
            simulation.counters.in_place += len(chosen)
            simulation.top.link.slow = True
        return chosen

    def _take_ready(self, in_order: bool) -> list[int]:
        """Return experts to compute now, at least one; wait if no bytes are there."""
        simulation, top, layer = self.simulation, self.simulation.top, self.event.layer
        self._request_missing()
        most = simulation.setup.run_experts if in_order else len(self.event.experts)
        if self.missing:
            most = min(most, max(1, len(self.waiting) // 2))
        top.link.advance(simulation.now)
        if self.waiting and (in_order or self.missing):
            taken, self.waiting = self.waiting[:most], self.waiting[most:]
            for expert in taken:
                self._wait(expert, top.transfer(ExpertKey(layer, expert)))
            return taken
        transfers = {e: top.transfer(ExpertKey(layer, e)) for e in self.waiting} | self.slotless
        candidates = list(transfers)
        there = [e for e in candidates if _there(transfers[e], simulation.now)]
        if not there:
            first = top.link.finish_first([t for e in candidates if (t := transfers[e]) is not None])
            expert = next(e for e in candidates if transfers[e] is first)
            self._wait(expert, first)
            there = [expert]
        taken = there[:most]
        self.waiting = [expert for expert in self.waiting if expert not in taken]
        return taken

    def _wait(self, expert: int, transfer: Transfer | None) -> None:
        """Wait for the bytes of an expert."""
        if transfer is not None:
            done = self.simulation.top.link.finish(transfer)
            self._stall("late" if expert in self.hits else "demand", done)

    def _stall(self, cause: str, until: float) -> None:
        waited = max(0.0, until - self.simulation.now)
        self.simulation.counters.stall_seconds[cause] += waited
        self.simulation.now += waited

    def _request_missing(self) -> None:
        """Give slots to as many misses as can have one now."""
        simulation, top = self.simulation, self.simulation.top
        while self.missing:
            expert = self.missing[0]
            key = ExpertKey(self.event.layer, expert)
            if not top.holds(key):
                if top.wants_bypass(key):
                    self.slotless[expert] = top.pass_through(key, simulation.now)
                    simulation.counters.bypassed += 1
                    self.missing.pop(0)
                    continue
                stuck = not self.waiting and not self.slotless
                if not top.request(key, Priority.DEMAND, simulation.now, must=stuck, spared=self.spared):
                    return
            self._hold(expert)
            self.missing.pop(0)

    def _hold(self, expert: int) -> None:
        self.simulation.top.lease(ExpertKey(self.event.layer, expert))
        self.waiting.append(expert)
        self.spared.discard(expert)

    def _read_next_layer(self) -> None:
        """As the engine: across the next layer's attention, where a prompt will use all experts."""
        setup, top, event = self.simulation.setup, self.simulation.top, self.event
        following = event.layer + 1
        layers = setup.geometry.layers
        if (
            setup.dense_prefetch is None
            or event.phase == "decode"
            or event.tokens == 1
            or self.missing
            or following >= len(layers)
            or event.tokens * layers[following].top_k < setup.dense_prefetch * layers[following].experts
        ):
            return
        everyone = range(layers[following].experts)
        for expert in everyone:
            key = ExpertKey(following, expert)
            if not top.holds(key) and not top.request(
                key, Priority.PREFETCH, self.simulation.now, spared=everyone
            ):
                return


def _there(transfer: Transfer | None, now: float) -> bool:
    """Whether all bytes have come by ``now``."""
    return transfer is None or (transfer.done is not None and transfer.done <= now)
