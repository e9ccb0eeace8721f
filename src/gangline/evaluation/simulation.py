"""Simulate several caches at several capacities on one trace, with the bounds beside each."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from gangline.core.errors import UsageError
from gangline.core.events import Need, Phase, RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.sizes import format_size, parse_size
from gangline.policies.caches import CachePolicy, make_cache
from gangline.policies.predictors.oracle import Oracle
from gangline.policies.prefetch import WholeSet
from gangline.traces import Trace
from gangline.traces.replay import one_by_one
from gangline.traces.simulator import (
    Bounds,
    LevelSpec,
    Line,
    Setup,
    SimLink,
    SimMachine,
    SimReport,
    make_report,
    simulate,
)

# A prompt that brings this many pairs per expert makes the engine read the next layer ahead.
DENSE_PREFETCH = 2.0
# Experts of a prompt that the engine computes before it gives their slots free.
RUN_EXPERTS = 8


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate.

    Attributes:
        policies: names of caches, ``NAME`` or ``NAME:KEY=VALUE:KEY=VALUE``; ``@global`` after the name makes
            one pool of all layers.
        capacities: slots (``64``), a share of all experts (``50%``), bytes (``2GiB``) or ``rho=2``.
        phase: replay only these passes; None for all.
        replay: passes as recorded, or ``tokens`` one by one; None chooses.
        link: bytes per second into the slots; None takes what was measured on this machine, if anything.
        expert_seconds: of one expert, read once from memory; None follows from the measured memory.
        layer_seconds: between two MoE layers.
        bypass: whether misses may pass through without a slot.
        oracles: layers ahead of the oracle rows.
        tokens: replay at most this many.
        calibration: another trace, from which ``static-hot`` takes its experts.
    """

    policies: Sequence[str]
    capacities: Sequence[str]
    phase: Phase | None = None
    replay: Literal["passes", "tokens"] | None = None
    link: float | None = None
    expert_seconds: float | None = None
    layer_seconds: float = 0.0
    bypass: bool = False
    oracles: Sequence[int] = (1, 8)
    tokens: int | None = None
    calibration: Trace | None = None


@dataclass(frozen=True)
class SimulationResult:
    """All rows.

    Attributes:
        trace, model: names.
        tokens: replayed.
        experts: routed experts of the model; ``expert_bytes`` the mean size of one.
        replay: in words.
        link_bytes_per_second: that was assumed; None if time was not modelled.
        rows: for each capacity the policies, then Belady's cache, then oracles.
        notes: what a reader must know.
    """

    trace: str
    model: str
    tokens: int
    experts: int
    expert_bytes: float
    replay: str
    link_bytes_per_second: float | None
    rows: tuple[SimReport, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"kind": "simulated", **asdict(self)}


def simulate_trace(
    trace: Trace, settings: SimulationSettings, progress: Callable[[int, int], None] | None = None
) -> SimulationResult:
    """Replay a trace through every policy at every capacity.

    Args:
        trace: in mode ``full`` or ``ids``.
        settings: see there.
        progress: called with runs done and runs in all.

    Raises:
        UsageError: a policy, a parameter or a capacity is not known.
        TraceError: the trace lacks rows of the phase, or what a policy needs to see.
    """
    trace, words = _rows(trace, settings)
    geometry, expert_bytes = trace.header.geometry, trace.header.expert_bytes
    capacities = [capacity_slots(text, trace) for text in settings.capacities]
    speed, machine, notes = _costs(trace, settings)
    dense = None if words == _ONE_BY_ONE else DENSE_PREFETCH
    base = Setup(geometry, expert_bytes, (), machine, dense_prefetch=dense, run_experts=RUN_EXPERTS)
    link = SimLink() if speed is None else SimLink(bytes_per_second=speed)
    named: list[tuple[str, int | None]] = [(name, None) for name in settings.policies]
    clairvoyant: list[tuple[str, int | None]] = [(_BOUND, None), *((_BOUND, h) for h in settings.oracles)]
    runs = list(itertools.product(capacities, [*named, *clairvoyant]))
    rows: list[SimReport] = []
    events: dict[frozenset[Need], list[RoutingEvent]] = {}
    plain = _events(trace, frozenset(), events)
    bounds = Bounds(plain)
    for number, (slots, (name, ahead)) in enumerate(runs):
        policy = build_cache(name, slots, trace, plain, settings.calibration)
        mine = _events(trace, frozenset(policy.needs) - {"future"}, events)
        level = LevelSpec("host", slots, policy, link, settings.bypass or name == _BOUND)
        setup = replace(base, levels=(level,))
        if ahead is not None:
            setup = replace(setup, predictors=(Oracle(plain, ahead),), prefetcher=WholeSet())
        label = name if ahead is None else f"{name} + oracle({ahead})"
        rows.append(make_report(label, setup, simulate(setup, mine), bounds))
        if progress is not None:
            progress(number + 1, len(runs))
    return SimulationResult(
        trace.name,
        trace.header.model,
        len(trace),
        geometry.total_experts,
        sum(b * n for b, n in zip(expert_bytes, trace.header.experts, strict=True)) / geometry.total_experts,
        words,
        speed,
        tuple(rows),
        tuple(notes),
    )


_BOUND = "belady-bypass@global"
_ONE_BY_ONE = "each token as a decoding pass of its own"


def _rows(trace: Trace, settings: SimulationSettings) -> tuple[Trace, str]:
    replay = settings.replay or ("tokens" if trace.header.source == "text" else "passes")
    if replay == "tokens":
        trace = one_by_one(trace)
    if settings.phase is not None:
        trace = trace.select(phase=settings.phase)
    if settings.tokens is not None and settings.tokens < len(trace):
        kept = [rows.stop for rows in trace.passes if rows.stop <= settings.tokens]
        last = kept[-1] if kept else trace.passes[0].stop
        trace = trace.select(rows=[row < last for row in range(len(trace))])
    return trace, _ONE_BY_ONE if replay == "tokens" else "passes as recorded"


def _events(
    trace: Trace, needs: frozenset[Need], known: dict[frozenset[Need], list[RoutingEvent]]
) -> list[RoutingEvent]:
    """The events with what a policy needs, and with requests, so that policies hear of sequences."""
    if needs not in known:
        known[needs] = list(trace.events(needs | {"requests"}))
    return known[needs]


def build_cache(
    text: str,
    slots: int,
    trace: Trace,
    events: Sequence[RoutingEvent],
    calibration: Trace | None = None,
) -> CachePolicy:
    """Build a cache from ``NAME[@global][:KEY=VALUE]...``.

    Raises:
        UsageError: the name or a parameter is not known, or ``static-hot`` has no other trace to learn from.
    """
    name, *pairs = text.split(":")
    name, _, scope = name.partition("@")
    if scope not in ("", "global", "layer"):
        raise UsageError(f"{text}: scope {scope!r} must be global or layer, as in lru@global")
    params: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{text}: write parameters as KEY=VALUE, for example lfru:privileged=0.3")
        params[key] = _number(value)
    if name == "static-hot":
        if calibration is None:
            raise UsageError("static-hot needs another trace to learn from; give --calibrate TRACE")
        params["hot"] = hottest(calibration, slots)
    return make_cache(
        name,
        slots=slots,
        geometry=trace.header.geometry,
        scope="global" if scope == "global" else "layer",
        events=events,
        **params,
    )


def hottest(trace: Trace, slots: int) -> list[ExpertKey]:
    """Return the ``slots`` experts that the most tokens of a trace chose."""
    counts: Counter[ExpertKey] = Counter()
    for number in trace.layers:
        rows = trace.layer(number)
        chosen = rows.ids_RK if rows.keep_RK is None else rows.ids_RK[rows.keep_RK]
        found, times = np.unique(chosen, return_counts=True)
        pairs = zip(found.tolist(), times.tolist(), strict=True)
        counts.update({ExpertKey(number, expert): count for expert, count in pairs})
    return [key for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:slots]]


def _number(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def capacity_slots(text: str, trace: Trace) -> int:
    """Return the slots of a capacity: ``64``, ``50%``, ``2GiB`` or ``rho=2``.

    Raises:
        UsageError: it is none of these, or is less than one slot.
    """
    geometry, header = trace.header.geometry, trace.header
    everyone = geometry.total_experts
    try:
        if text.endswith("%"):
            slots = int(everyone * float(text[:-1]) / 100)
        elif text.startswith("rho="):
            slots = round(geometry.active_experts * float(text[4:]))
        elif text.isdigit():
            slots = int(text)
        else:
            slots = parse_size(text) // max(header.expert_bytes)
    except (ValueError, UsageError) as error:
        raise UsageError(f"capacity {text!r} is no number of slots, share, size or rho=NUMBER") from error
    if slots < 1:
        raise UsageError(
            f"capacity {text} is less than one expert ({format_size(max(header.expert_bytes))}); give more"
        )
    return min(slots, everyone)


def _costs(trace: Trace, settings: SimulationSettings) -> tuple[float | None, SimMachine, list[str]]:
    """What moving and computing cost: as given, else as measured on this machine, else nothing."""
    from gangline.runtime.machine import load_profile

    profile = load_profile()
    speed, seconds = settings.link, settings.expert_seconds
    notes = []
    if profile is not None:
        speed = speed or profile.best_disk[2]
        if seconds is None:
            seconds = max(trace.header.expert_bytes) / profile.ram
    if speed is None:
        return (
            None,
            SimMachine(),
            ["no times: give --link, or run 'gangline doctor' once to measure the disk"],
        )
    machine = SimMachine(Line(seconds or 0.0), Line(settings.layer_seconds))
    if seconds is None:
        notes.append("computing experts takes no time here; give --compute-us, or run 'gangline doctor'")
    if not settings.layer_seconds:
        notes.append("attention takes no time here, so tokens/s are an upper limit; give --layer-us")
    return speed, machine, notes
