"""The experts of one event in the simulation, computed as their bytes come."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.traces.simulator.level import Level
from gangline.traces.simulator.link import Transfer

if TYPE_CHECKING:
    from gangline.traces.simulator.run import Simulation


@dataclass
class EventRuns:
    """An event, by the parts of it that different slots serve, as the engine computes them."""

    simulation: "Simulation"
    event: RoutingEvent
    runs: "list[EventRun]"
    told: bool = False

    def go(self) -> None:
        """Request the misses of all parts, then compute one part after the other."""
        for run in self.runs:
            run.begin()
        self._tell()
        for run in self.runs:
            while run.busy:
                experts = run.take_ready()
                self._tell()
                run.compute(experts)
                self._read_next_layer()
        self.runs[0].wait_for_pool()

    @property
    def _all_requested(self) -> bool:
        return not any(run.missing for run in self.runs)

    def _tell(self) -> None:
        """Let predictors see the event once all its misses are requested, so that no prefetch delays one."""
        if not self.told and self._all_requested:
            self.told = True
            self.simulation.forecast(self.event)

    def _read_next_layer(self) -> None:
        """As the engine: across the next layer's attention, where a prompt will use all experts."""
        setup, top, event = self.simulation.setup, self.simulation.top, self.event
        following = event.layer + 1
        layers = setup.geometry.layers
        if (
            setup.dense_prefetch is None
            or event.phase == "decode"
            or event.tokens == 1
            or not self._all_requested
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


@dataclass
class EventRun:
    """Experts of one event, computed as their bytes come; mirrors the engine's lease of an event.

    A single token takes hits first and misses as they arrive. Several tokens take experts in ascending id,
    which streams a prompt through few slots; hits that come later are spared.
    """

    simulation: "Simulation"
    level: Level
    event: RoutingEvent
    hits: set[int]
    waiting: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    spared: set[int] = field(default_factory=set)
    slotless: dict[int, Transfer] = field(default_factory=dict)
    pool_done: float = 0.0

    def __post_init__(self) -> None:
        self.counts = dict(zip(self.event.experts, self.event.counts, strict=True))

    def begin(self) -> None:
        """Lease hits and request misses."""
        in_place = self._in_place(self.counts)
        self.missing = [e for e in self.event.experts if e not in in_place]
        if self.event.tokens > 1:
            self.spared = self.hits.copy()
        else:
            self.missing = [e for e in self.missing if e not in self.hits]
            for expert in sorted(self.hits):
                self._hold(expert)
        self._request_missing()

    @property
    def busy(self) -> bool:
        """Whether experts are left to compute."""
        return bool(self.waiting or self.missing or self.slotless)

    def compute(self, experts: Sequence[int]) -> None:
        """Compute experts whose bytes are there, and let others have their slots."""
        for expert in experts:
            self.simulation.compute_expert(self.counts[expert])
        for expert in experts:
            if expert in self.slotless:
                del self.slotless[expert]
            else:
                self.level.release(ExpertKey(self.event.layer, expert))
        self._request_missing()

    def wait_for_pool(self) -> None:
        """Wait for experts that the CPU pool computes."""
        if self.pool_done > self.simulation.now:
            self._stall("in_place", self.pool_done)
        self.level.link.slow = False

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
            self.level.link.slow = True
        return chosen

    def take_ready(self) -> list[int]:
        """Return experts to compute now, at least one; wait if no bytes are there."""
        simulation, top, layer = self.simulation, self.level, self.event.layer
        in_order = self.event.tokens > 1
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
            done = self.level.link.finish(transfer)
            self._stall("late" if expert in self.hits else "demand", done)

    def _stall(self, cause: str, until: float) -> None:
        waited = max(0.0, until - self.simulation.now)
        self.simulation.counters.stall_seconds[cause] += waited
        self.simulation.now += waited

    def _request_missing(self) -> None:
        """Give slots to as many misses as can have one now."""
        simulation, top = self.simulation, self.level
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
        self.level.lease(ExpertKey(self.event.layer, expert))
        self.waiting.append(expert)
        self.spared.discard(expert)


def _there(transfer: Transfer | None, now: float) -> bool:
    """Whether all bytes have come by ``now``."""
    return transfer is None or (transfer.done is not None and transfer.done <= now)
