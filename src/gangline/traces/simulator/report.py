"""A simulated run in numbers, beside the bounds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gangline.core.events import RoutingEvent
from gangline.traces.simulator.bounds import Bound, belady
from gangline.traces.simulator.counters import PhaseCounts
from gangline.traces.simulator.run import Run, Setup


@dataclass(frozen=True)
class LevelReport:
    """One tier.

    Attributes:
        name, slots: as given.
        link: name of the link that fills it.
        bytes_moved: over that link, by priority class; ``bytes_per_token`` of all classes together.
        useful_prefetch_bytes: of prefetches that an event used; ``wasted_prefetch_bytes`` of the others.
        evictions: experts that gave up their slot.
        busy_seconds: time in which the link moved bytes.
    """

    name: str
    slots: int
    link: str
    bytes_moved: dict[str, int]
    bytes_per_token: float
    useful_prefetch_bytes: int
    wasted_prefetch_bytes: int
    evictions: int
    busy_seconds: float


@dataclass(frozen=True)
class SimReport:
    """A run beside its bounds. All of it is simulated.

    Attributes:
        policy: what the first tier's policy was called.
        slots: of the first tier; ``rho`` per layer and token: slots / (layers * K).
        exact: whether the policy can change a model's output (False) or not.
        tokens: tokens replayed.
        hit_rate: share of distinct experts per event that had a slot; None without events.
        selection_hit_rate: each expert counted once per token that chose it.
        phases: the counters by phase, with their hit rates.
        levels: see :class:`LevelReport`.
        belady, belady_mandatory: hit rates of the clairvoyant cache that may let experts pass through, and of
            the one that must keep an event's experts; no prefetching, one pool.
        of_belady: hits of experts that no prefetch had brought, as a share of those of ``belady``; None with
            a prefetcher or a second precision, which play another game.
        misses_per_token: experts fetched or computed in place per token.
        pressure: distinct experts per event as a share of the slots of one layer.
        stall_seconds: by cause. ``seconds`` and ``tokens_per_second`` of the whole; None if nothing takes
            time.
        floor_seconds: the larger of computing and the fewest bytes over the slowest link.
        bound_share: ``floor_seconds / seconds``; None if nothing takes time.
    """

    policy: str
    slots: int
    rho: float
    exact: bool
    tokens: int
    hit_rate: float | None
    selection_hit_rate: float | None
    phases: dict[str, dict[str, Any]]
    levels: tuple[LevelReport, ...]
    belady: float | None
    belady_mandatory: float | None
    of_belady: float | None
    misses_per_token: float
    pressure: float
    in_place: int
    bypassed: int
    stall_seconds: dict[str, float]
    compute_seconds: float
    seconds: float | None
    tokens_per_second: float | None
    floor_seconds: float | None
    bound_share: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


class Bounds:
    """The bounds of some events, computed once for each number of slots.

    Args:
        events: the events that are replayed.
    """

    def __init__(self, events: Sequence[RoutingEvent]) -> None:
        self._events = events
        self._known: dict[tuple[int, bool], Bound] = {}

    def belady(self, slots: int, *, bypass: bool = True) -> Bound:
        """See :func:`gangline.traces.simulator.bounds.belady`."""
        if (slots, bypass) not in self._known:
            self._known[slots, bypass] = belady(self._events, slots, bypass=bypass)
        return self._known[slots, bypass]


def make_report(policy: str, setup: Setup, run: Run, bounds: Bounds) -> SimReport:
    """Sum a run up.

    Args:
        policy: what to call it.
        setup: of the run.
        run: as :func:`simulate` returned it.
        bounds: of the events that were replayed.
    """
    counters, slots = run.counters, setup.levels[0].slots
    hits, misses, tokens = (counters.total(name) for name in ("hits", "misses", "tokens"))
    picked = counters.total("hit_tokens"), counters.total("miss_tokens")
    rate = hits / (hits + misses) if hits + misses else None
    best, mandatory = (bounds.belady(slots, bypass=bypass) for bypass in (True, False))
    layers = setup.geometry.layers
    floor = _floor(setup, run, bounds)
    timed = run.seconds > 0
    return SimReport(
        policy=policy,
        slots=slots,
        rho=slots / setup.geometry.active_experts,
        exact=bool(setup.levels[0].policy.exact) and (setup.copies is None or setup.copies.rule.exact),
        tokens=tokens,
        hit_rate=rate,
        selection_hit_rate=picked[0] / sum(picked) if sum(picked) else None,
        phases={name: _phase(counts) for name, counts in counters.phases.items() if counts.events},
        levels=tuple(_level(level, tokens) for level in run.levels),
        belady=best.hit_rate,
        belady_mandatory=mandatory.hit_rate,
        of_belady=_share(setup, hits - counters.total("by_prefetch"), best.hits),
        misses_per_token=misses / tokens if tokens else 0.0,
        pressure=_pressure(counters.total("distinct"), counters.total("events"), slots / len(layers)),
        in_place=counters.in_place,
        bypassed=counters.bypassed,
        stall_seconds=dict(counters.stall_seconds),
        compute_seconds=counters.compute_seconds,
        seconds=run.seconds if timed else None,
        tokens_per_second=tokens / run.seconds if timed else None,
        floor_seconds=floor if timed else None,
        bound_share=floor / run.seconds if timed else None,
    )


def _share(setup: Setup, kept: int, best: int) -> float | None:
    return kept / best if best and setup.prefetcher is None and setup.copies is None else None


def _pressure(distinct: int, events: int, slots_per_layer: float) -> float:
    return distinct / events / slots_per_layer if events else 0.0


def _phase(counts: PhaseCounts) -> dict[str, Any]:
    rates = {"hit_rate": counts.hit_rate, "selection_hit_rate": counts.selection_hit_rate}
    return asdict(counts) | rates


def _level(level: Any, tokens: int) -> LevelReport:
    moved = {priority.name.lower(): nbytes for priority, nbytes in level.link.moved.items()}
    return LevelReport(
        name=level.spec.name,
        slots=level.spec.slots,
        link=level.spec.link.name,
        bytes_moved=moved,
        bytes_per_token=sum(moved.values()) / tokens if tokens else 0.0,
        useful_prefetch_bytes=level.useful_bytes,
        wasted_prefetch_bytes=level.wasted_bytes,
        evictions=level.evictions,
        busy_seconds=level.link.busy,
    )


def _floor(setup: Setup, run: Run, bounds: Bounds) -> float:
    """Seconds that nothing can save: what is computed anyway, or the fewest bytes over a link.

    Slots of all tiers together stand between the last link and the device. Experts that the CPU pool computes
    where they lie need no transfer, nor do experts that are left out, so with these bytes give no floor.
    """
    if setup.in_place is not None or setup.copies is not None:
        return run.counters.compute_seconds
    floors = [run.counters.compute_seconds]
    slots = 0
    for spec in setup.levels:
        slots += spec.slots
        nbytes = bounds.belady(slots).misses * min(setup.expert_bytes)
        floors.append(nbytes / spec.link.bytes_per_second)
    return max(floors)
