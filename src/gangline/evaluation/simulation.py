"""Simulate several caches at several capacities on one trace, with the bounds beside each."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from gangline.core.errors import GanglineError, UsageError
from gangline.core.events import Need, Phase, RoutingEvent
from gangline.core.sizes import format_size, parse_size
from gangline.formats import get_codec
from gangline.policies.caches import CachePolicy, make_cache
from gangline.policies.caches.static_hot import hottest
from gangline.policies.compositions import COMPOSITIONS, Composition, find_composition, make_precision
from gangline.policies.parts import Material, build_parts
from gangline.policies.precision import divide_slots, low_precision
from gangline.policies.predictors.next_gate import Gate
from gangline.policies.predictors.oracle import Oracle
from gangline.policies.prefetch import WholeSet
from gangline.runtime.event_rules import DENSE_PAIRS_PER_EXPERT, RUN_EXPERTS
from gangline.runtime.opened import codec_of
from gangline.traces import Trace
from gangline.traces.replay import expert_tokens, one_by_one
from gangline.traces.simulator import (
    Bounds,
    Copies,
    LevelSpec,
    Line,
    Setup,
    SimLink,
    SimMachine,
    SimReport,
    make_report,
    simulate,
)

_PAGE = 4096

ALL = "all"
"""As the only system: every exact composition that can be built."""


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
        machine: costs of computing in place of the two before.
        bypass: whether misses may pass through without a slot.
        oracles: layers ahead of the oracle rows.
        tokens: replay at most this many.
        calibration: another trace, from which ``static-hot`` takes its experts.
        systems: compositions, by name or ``.yaml`` file: cache, predictor and prefetch together. ``all``
            takes every exact one that can be built and notes the others.
        slots_of_both: slots of experts and of their copies in low precision, for systems that have both;
            None divides the capacity.
    """

    policies: Sequence[str]
    capacities: Sequence[str]
    phase: Phase | None = None
    replay: Literal["passes", "tokens"] | None = None
    link: float | None = None
    expert_seconds: float | None = None
    layer_seconds: float = 0.0
    machine: SimMachine | None = None
    bypass: bool = False
    oracles: Sequence[int] = (1, 8)
    tokens: int | None = None
    calibration: Trace | None = None
    systems: Sequence[str] = ()
    slots_of_both: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModelParts:
    """What systems need of the model itself.

    Attributes:
        gates: scores of each layer's experts from its gate inputs.
        embed: embeddings ``[T, D]`` of token ids.
        network: of a learned predictor, and ``network_kind`` its name.
    """

    gates: Sequence[Gate] | None = None
    embed: Callable[[Sequence[int]], Any] | None = None
    network: Any = None
    network_kind: str | None = None


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
    trace: Trace,
    settings: SimulationSettings,
    progress: Callable[[int, int], None] | None = None,
    model: ModelParts | None = None,
) -> SimulationResult:
    """Replay a trace through every policy at every capacity.

    Args:
        trace: in mode ``full`` or ``ids``.
        settings: see there.
        progress: called with runs done and runs in all.
        model: for systems whose predictors read more than the trace.

    Raises:
        UsageError: a policy, a parameter or a capacity is not known.
        TraceError: the trace lacks rows of the phase, or what a policy needs to see.
    """
    trace, words = _rows(trace, settings)
    geometry, expert_bytes = trace.header.geometry, trace.header.expert_bytes
    capacities = [capacity_slots(text, trace) for text in settings.capacities]
    speed, machine, notes = _costs(trace, settings)
    dense = None if words == _ONE_BY_ONE else DENSE_PAIRS_PER_EXPERT
    base = Setup(geometry, expert_bytes, (), machine, dense_prefetch=dense, run_experts=RUN_EXPERTS)
    link = SimLink() if speed is None else SimLink(bytes_per_second=speed)
    events = _Events(trace)
    material = _material(trace, settings, model or ModelParts(), events.plain)
    bench = _Bench(settings, events, base, link, material, (model or ModelParts()).embed)
    systems, left_out = _systems(settings.systems, bench)
    jobs = [partial(bench.cache, name) for name in settings.policies]
    jobs += [partial(bench.system, name, found) for name, found in systems]
    jobs += [partial(bench.clairvoyant, ahead) for ahead in (None, *settings.oracles)]
    rows: list[SimReport] = []
    for slots, job in itertools.product(capacities, jobs):
        rows.append(job(slots))
        if progress is not None:
            progress(len(rows), len(capacities) * len(jobs))
    return SimulationResult(
        trace.name,
        trace.header.model,
        len(trace),
        geometry.total_experts,
        sum(b * n for b, n in zip(expert_bytes, trace.header.experts, strict=True)) / geometry.total_experts,
        words,
        speed,
        tuple(rows),
        tuple(notes + left_out),
    )


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


class _Events:
    """The events of a trace, made once for each set of needs."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[frozenset[Need], list[RoutingEvent]] = {}
        self.plain = self.having(frozenset())
        self.bounds = Bounds(self.plain)

    def having(self, needs: frozenset[Need]) -> list[RoutingEvent]:
        """Return events with what a policy needs, and with requests, so that it hears of sequences."""
        if needs not in self._known:
            self._known[needs] = list(self.trace.events(needs | {"requests"}))
        return self._known[needs]


@dataclass(frozen=True)
class _Bench:
    """Runs one policy after another on the same events."""

    settings: SimulationSettings
    events: _Events
    base: Setup
    link: SimLink
    material: Material
    embed: Callable[[Sequence[int]], Any] | None

    def cache(self, name: str, slots: int) -> SimReport:
        """Simulate a cache alone."""
        trace, plain = self.events.trace, self.events.plain
        policy = build_cache(name, slots, trace, plain, self.settings.calibration)
        setup = replace(self.base, levels=(self._level(slots, policy),))
        return self._run(name, setup, frozenset(policy.needs) - {"future"})

    def system(self, name: str, found: Composition, slots: int) -> SimReport:
        """Simulate cache, predictor and prefetch of a composition."""
        copies = None
        if found.precision is not None:
            nbytes = copy_bytes(found, self.events.trace)
            layers = len(nbytes)
            slots, low = self.settings.slots_of_both or self._divided(found, slots, max(nbytes))
            pools = [(slots, range(layers)), (low, range(layers, 2 * layers))]
            parts = build_parts(found, self.material, pools)
            assert parts.precision is not None
            copies = Copies(parts.precision, low, parts.caches[1], nbytes)
        else:
            parts = build_parts(found, self.material, slots)
        predictors = () if parts.predictor is None else (parts.predictor,)
        setup = replace(
            self.base,
            levels=(self._level(slots, parts.caches[0]),),
            predictors=predictors,
            prefetcher=parts.prefetcher,
            embed=self.embed,
            copies=copies,
        )
        return self._run(name, setup, parts.needs)

    def _divided(self, found: Composition, slots: int, low_bytes: int) -> tuple[int, int]:
        """Divide a capacity between experts and their copies, with whole pages for each as in the engine."""
        share, total = make_precision(found).share, self.base.geometry.total_experts
        high, low = (-(-size // _PAGE) * _PAGE for size in (max(self.base.expert_bytes), low_bytes))
        return divide_slots(slots, high, low, share, total)

    def clairvoyant(self, ahead: int | None, slots: int) -> SimReport:
        """Simulate Belady's cache, with an oracle that reads ``ahead`` events ahead."""
        policy = make_cache(
            "belady-bypass",
            slots=slots,
            geometry=self.base.geometry,
            scope="global",
            events=self.events.plain,
        )
        level = replace(self._level(slots, policy), bypass=True)
        setup, name = replace(self.base, levels=(level,)), "belady-bypass@global"
        if ahead is not None:
            oracle = Oracle(self.events.plain, ahead)
            setup = replace(setup, predictors=(oracle,), prefetcher=WholeSet())
            name += f" + oracle({ahead})"
        return self._run(name, setup, frozenset())

    def _level(self, slots: int, policy: CachePolicy) -> LevelSpec:
        return LevelSpec("host", slots, policy, self.link, self.settings.bypass)

    def _run(self, name: str, setup: Setup, needs: frozenset[Need]) -> SimReport:
        run = simulate(setup, self.events.having(needs))
        return make_report(name, setup, run, self.events.bounds)


def copy_bytes(found: Composition, trace: Trace) -> list[int]:
    """Return the bytes of a copy in low precision of an expert of each layer of a trace's model.

    Raises:
        UsageError: it is no smaller than the expert.
    """
    header, mixed = trace.header, make_precision(found)
    layers = header.geometry.layers
    bits = 8 * sum(header.expert_bytes) / sum(layer.expert_params for layer in layers)
    name = mixed.bits or low_precision(bits)
    codec = codec_of(name)
    sizes = []
    for layer, full in zip(layers, header.expert_bytes, strict=True):
        wide, narrow = (layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate)
        form = None if codec is None else get_codec(codec)
        nbytes = full if form is None else (layer.matrices - 1) * form.nbytes(wide) + form.nbytes(narrow)
        if nbytes >= full:
            raise UsageError(
                f"copies in {name} are no smaller than the experts of {header.model}; lower bits"
            )
        sizes.append(nbytes)
    return sizes


def _material(
    trace: Trace,
    settings: SimulationSettings,
    model: ModelParts,
    events: Sequence[RoutingEvent],
) -> Material:
    """What compositions are made of in a simulation."""
    popular = None
    if settings.calibration is not None:
        tokens = expert_tokens(settings.calibration)
        popular = hottest(tokens, len(tokens))
    return Material(trace.header.geometry, model.gates, model.network, model.network_kind, popular, events)


def _systems(names: Sequence[str], bench: _Bench) -> tuple[list[tuple[str, Composition]], list[str]]:
    """Return the compositions to simulate, and what is to be said of those that ``all`` leaves out."""
    if list(names) != [ALL]:
        return [(name, find_composition(name)) for name in names], []
    systems, notes = [], []
    for name, one in COMPOSITIONS.items():
        if not one.exact:
            continue
        try:
            needs = build_parts(one, bench.material, 1).needs
            bench.events.having(needs)
            systems.append((name, one))
        except GanglineError as error:
            notes.append(f"{name} is left out: {error}")
    return systems, notes


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
        params["hot"] = hottest(expert_tokens(calibration), slots)
    return make_cache(
        name,
        slots=slots,
        geometry=trace.header.geometry,
        scope="global" if scope == "global" else "layer",
        events=events,
        **params,
    )


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
    notes: list[str] = []
    if settings.machine is not None and speed is not None:
        return speed, settings.machine, notes
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
