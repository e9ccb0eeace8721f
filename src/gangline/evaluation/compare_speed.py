"""``bench --compare``: our speed beside another engine's, on the same weights and the same tokens, in turns.

Every engine runs in a process of its own. In each round each of them reads the same prompts and is fed the
same tokens that follow, ours first, and the round's ratio is taken: a noisy minute then hits both. All stay
loaded if memory permits; else each is loaded and freed again in every round.

Legend: B sequences, P prompt tokens, N new tokens.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from gangline.core.sizes import parse_size
from gangline.evaluation.bound import Bandwidths, Weights, bandwidths
from gangline.evaluation.compare_speed_peers import Peer, PeerName, find_peer
from gangline.evaluation.compare_speed_process import SideProcess
from gangline.evaluation.compare_speed_worker import DTYPES
from gangline.evaluation.plain import find_checkpoint, load_tokenizer, place
from gangline.evaluation.speed import Progress, SpeedSettings, draw_tokens, make_report, with_context
from gangline.evaluation.speed_report import PeerSpeed, SpeedReport, Spread
from gangline.evaluation.speed_run import Sample
from gangline.evaluation.speed_side import Facts

logger = logging.getLogger(__name__)

OURS = "gangline"
_SHARE_OF_FREE = 0.85


@dataclass
class Runs:
    """What was measured of one side.

    Attributes:
        samples: one a round.
        beside: bandwidths right before and right after each.
    """

    samples: list[Sample] = field(default_factory=list)
    beside: list[tuple[Bandwidths, Bandwidths]] = field(default_factory=list)


def compare_speed(
    model: str | Path,
    peers: Sequence[PeerName],
    settings: SpeedSettings | None = None,
    *,
    name: str | None = None,
    progress: Progress | None = None,
    together: bool | None = None,
    **loading: Any,
) -> SpeedReport:
    """Time ours and other engines in turns.

    Args:
        model: as for :func:`gangline.load`.
        peers: the engines.
        settings: how long to measure.
        name: what the report calls the model.
        progress: called with the name of each step as it begins.
        together: whether all stay loaded; None decides by the memory that is free.
        loading: options of :func:`gangline.load`. ``memory`` limits ours alone: the others know no budget.

    Raises:
        UsageError: an engine is not installed or cannot run these weights.
        GanglineError: one side cannot be loaded, or ended.
    """
    settings = settings or SpeedSettings()
    found = place(model)
    threads = loading.get("threads") or default_threads()
    common = {key: loading[key] for key in ("precision", "dtype", "revision") if loading.get(key) is not None}
    say = progress or logger.info
    prepared = [
        find_peer(peer, found, settings, threads=threads, progress=say, **common)
        for peer in dict.fromkeys(peers)
    ]
    return compare_with(
        model,
        prepared,
        settings,
        name=name,
        progress=say,
        together=together,
        **loading | {"threads": threads},
    )


def compare_with(
    model: str | Path,
    peers: Sequence[Peer],
    settings: SpeedSettings,
    *,
    name: str | None = None,
    progress: Progress | None = None,
    together: bool | None = None,
    **loading: Any,
) -> SpeedReport:
    """Do as :func:`compare_speed` with engines that are prepared already."""
    say = progress or logger.info
    found = place(model)
    threads = loading.setdefault("threads", default_threads())
    tokenizer = load_tokenizer(find_checkpoint(found, loading.get("revision")))
    job = our_job(found, settings, loading)
    if together is None:
        together = _fits(found, peers, settings, loading)
    say("all sides stay loaded" if together else "too large to be loaded side by side: in turns")
    sides = {OURS: job} | {f"{peer.name} {peer.weights}": peer.job for peer in peers}
    rounds = _Rounds(sides, settings, tokenizer, threads, say)
    facts, runs = rounds.measure(together)
    ours = runs[OURS]
    report = make_report(
        facts,
        settings,
        ours.samples,
        ours.beside,
        model=name or str(model),
        text="random" if tokenizer is None else "text",
        routing="own",
        memory=parse_size(loading["memory"]) if loading.get("memory") is not None else None,
    )
    speeds = [
        _peer_speed(peer, runs[f"{peer.name} {peer.weights}"], ours.samples, settings) for peer in peers
    ]
    return replace(report, peers=tuple(speeds), together=together)


def default_threads() -> int:
    """Return the physical cores that this process may use: what every engine gets by default."""
    allowed = len(psutil.Process().cpu_affinity() or []) if hasattr(psutil.Process, "cpu_affinity") else 0
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return min(physical, allowed) if allowed else physical


def our_job(model: str | Path, settings: SpeedSettings, loading: dict[str, Any]) -> dict[str, Any]:
    """Return the job of our side (see ``compare_speed_worker.open_side``)."""
    given = {key: value for key, value in with_context(loading, settings).items() if value is not None}
    if "dtype" in given:
        given["dtype"] = next(name for name, dtype in DTYPES.items() if dtype == given["dtype"])
    return {"side": "ours", "model": str(model), "batch": settings.batch, **given}


def _fits(model: str | Path, peers: Sequence[Peer], settings: SpeedSettings, loading: dict[str, Any]) -> bool:
    from gangline.runtime.load import plan_model

    plan = plan_model(model, **with_context(loading, settings))
    needed = plan.peak + sum(peer.needed for peer in peers)
    return bool(needed <= psutil.virtual_memory().available * _SHARE_OF_FREE)


class _Rounds:
    """Runs all sides, round after round."""

    def __init__(
        self,
        jobs: dict[str, dict[str, Any]],
        settings: SpeedSettings,
        tokenizer: Any | None,
        threads: int,
        say: Progress,
    ) -> None:
        self._jobs = jobs
        self._settings = settings
        self._tokenizer = tokenizer
        self._threads = threads
        self._say = say
        self._facts: Facts | None = None
        self._latest: Bandwidths | None = None
        self.runs = {name: Runs() for name in jobs}

    def measure(self, together: bool) -> tuple[Facts, dict[str, Runs]]:
        """Return what ours says of itself at last, and the runs of every side."""
        rounds = range(self._settings.repetitions)
        if together:
            with ExitStack() as stack:
                sides = {name: stack.enter_context(self._open(name)) for name in self._jobs}
                for side in sides.values():
                    self._warm_up(side)
                for number in rounds:
                    for name, side in sides.items():
                        self._time(name, side, number)
        else:
            for number in rounds:
                for name in self._jobs:
                    with self._open(name) as side:
                        self._warm_up(side)
                        self._latest = None
                        self._time(name, side, number)
        assert self._facts is not None
        return self._facts, self.runs

    def _open(self, name: str) -> SideProcess:
        self._say(f"loading {name}")
        side = SideProcess(self._jobs[name], self._threads)
        if side.facts is not None:
            self._facts = side.facts
        return side

    def _warm_up(self, side: SideProcess) -> None:
        for run in range(self._settings.warmup):
            self._run(side, self._settings.seed - 1 - run)

    def _time(self, name: str, side: SideProcess, number: int) -> None:
        self._say(f"round {number + 1} of {self._settings.repetitions}: {name}")
        mine = self.runs[name]
        # The disk counts for ours only, and the best of all its windows counts: first and last will do.
        disk = name == OURS and number in (0, self._settings.repetitions - 1)
        before = self._latest if self._latest is not None and not disk else self._bandwidths(disk)
        mine.samples.append(self._run(side, self._settings.seed + number))
        self._latest = self._bandwidths(False)
        mine.beside.append((before, self._latest))
        if side.facts is not None:
            self._facts = side.facts

    def _run(self, side: SideProcess, seed: int) -> Sample:
        assert self._facts is not None
        ids_BP, following_BN = draw_tokens(
            self._tokenizer, self._facts.vocabulary, self._settings, seed % 2**31
        )
        return side.run(ids_BP, self._settings.new_tokens, following_BN)

    def _bandwidths(self, disk: bool) -> Bandwidths:
        assert self._facts is not None
        return bandwidths(self._facts.weights, self._threads, disk=disk)


def _peer_speed(peer: Peer, runs: Runs, ours: Sequence[Sample], settings: SpeedSettings) -> PeerSpeed:
    def ratio(seconds: Callable[[Sample], float]) -> Spread:
        return Spread.of(
            [seconds(theirs) / seconds(mine) for mine, theirs in zip(ours, runs.samples, strict=True)]
        )

    return PeerSpeed(
        name=peer.name,
        version=peer.version,
        weights=peer.weights,
        prefill=Spread.of([settings.prefill_rate(sample) for sample in runs.samples]),
        decode=Spread.of([settings.decode_rate(sample) for sample in runs.samples]),
        prefill_ratio=ratio(lambda sample: sample.prefill_seconds),
        decode_ratio=ratio(lambda sample: sample.decode_seconds),
        decode_share=None if peer.reads is None else _share(peer.reads, runs, ours, settings),
    )


def _share(reads: Weights, runs: Runs, ours: Sequence[Sample], settings: SpeedSettings) -> Spread:
    """Share of the memory bandwidth around each run that its decoding used at least."""
    # All engines route alike, so the experts that ours counted in a batch are theirs as well.
    found = statistics.median((sample.hits + sample.misses) / settings.steps for sample in ours)
    bytes_a_run = reads.step_bytes(settings.batch, found) * settings.steps
    return Spread.of(
        [
            bytes_a_run / sample.decode_seconds / max(before.memory, after.memory)
            for sample, (before, after) in zip(runs.samples, runs.beside, strict=True)
        ]
    )
