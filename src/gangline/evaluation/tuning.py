"""``tune``: which composition is fastest for a model in a memory budget on this machine.

A routing trace is replayed through every exact composition, with the speed of this machine as one run of the
default shows it; the best are then run live in turns, and the choice goes by the median of the ratios to the
default in the same round.
"""

import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gangline.core.errors import UsageError
from gangline.evaluation.plain import find_checkpoint, load_tokenizer, place
from gangline.evaluation.policy_runs import (
    LiveRun,
    Piece,
    at_speed_of,
    cut_pieces,
    model_parts,
    record_pieces,
    run_live,
)
from gangline.evaluation.simulation import ALL, ModelParts, SimulationSettings, simulate_trace
from gangline.runtime.load import load_model
from gangline.runtime.policy_choice import DEFAULT, PolicyChoice, asked_policy, store_tuned, tuned_file
from gangline.runtime.policy_setup import require_trace_of
from gangline.traces import Trace, open_trace
from gangline.traces.simulator import SimReport

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
_MARGIN = 1.02  # what the default must lose by: less is noise on most machines


@dataclass(frozen=True)
class TuneSettings:
    """How to tune.

    Attributes:
        data: texts to run; without any our own few sentences.
        trace: a recorded trace to simulate instead of one that is recorded now.
        prompt_tokens, new_tokens: of each piece of text.
        pieces: to record.
        rounds: live rounds; every candidate runs one warm-up piece and one timed piece in each.
        best: how many of the simulated compositions are confirmed live.
        predictor: what learned compositions need: a file of ``gangline predict train``, or a trace.
        store: whether to keep the choice for ``gangline.load``.
    """

    data: Sequence[Path] = ()
    trace: Path | None = None
    prompt_tokens: int = 48
    new_tokens: int = 48
    pieces: int = 4
    rounds: int = 5
    best: int = 3
    predictor: str | None = None
    store: bool = True

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.pieces, self.rounds, self.best) < 1 or self.new_tokens < 2:
            raise UsageError(
                "tuning needs at least 1 prompt token, piece, round and candidate, and 2 new tokens"
            )


@dataclass(frozen=True)
class Candidate:
    """One composition.

    Attributes:
        name: of the composition.
        simulated_tokens_per_second: with the speed of this machine; None if nothing took time.
        simulated_hit_rate, simulated_bytes_per_token: on the trace.
        tokens_per_second: live, one for each round; empty if it was not confirmed.
        ratio: median over rounds of its speed over the default's; None if it did not run.
        hit_rate: live, over all rounds.
    """

    name: str
    simulated_tokens_per_second: float | None
    simulated_hit_rate: float | None
    simulated_bytes_per_token: float
    tokens_per_second: tuple[float, ...] = ()
    ratio: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class TuneReport:
    """What was found.

    Attributes:
        model, precision, memory: what was tuned.
        slots, experts: expert slots in the budget, and experts in all.
        choice: the composition that ``load`` will use; None where all experts are in memory.
        stored: file of the choice, None if it was not kept.
        candidates: by simulated speed.
        trace_tokens: tokens of the trace.
        notes: compositions left out, and other things to know.
    """

    model: str
    precision: str
    memory: int | None
    slots: int
    experts: int
    choice: str | None
    stored: str | None
    candidates: tuple[Candidate, ...]
    trace_tokens: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def tune_model(
    model: str | Path,
    settings: TuneSettings | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **loading: Any,
) -> TuneReport:
    """Choose a composition and keep the choice for ``gangline.load``.

    Args:
        model: as for :func:`gangline.load`.
        settings: how to tune.
        revision: branch, tag or commit on the Hub.
        progress: called with the name of each step as it begins.
        loading: options of :func:`gangline.load` (``memory``, ``precision``, ``threads``, ...).

    Raises:
        GanglineError: the model cannot be loaded, or the trace is of another model.
    """
    settings = settings or TuneSettings()
    say = progress or logger.info
    tokenizer = load_tokenizer(find_checkpoint(model, revision))
    say("loading")
    ours: Any = load_model(
        place(model), **{"name": str(model), **loading, "revision": revision, "policy": "default"}
    )
    try:
        return _Tuning(str(model), ours, tokenizer, settings, say).report()
    finally:
        ours.gangline.close()


class _Tuning:
    def __init__(self, name: str, model: Any, tokenizer: Any, settings: TuneSettings, say: Progress) -> None:
        self.name, self.model, self.settings, self.say = name, model, settings, say
        self.runtime = model.gangline
        self.tokenizer = tokenizer
        count = max(settings.pieces, 2 * settings.rounds)
        self.pieces = cut_pieces(
            tokenizer,
            model.get_input_embeddings().num_embeddings,
            settings.data,
            prompt=settings.prompt_tokens,
            following=settings.new_tokens,
            count=count,
        )

    def report(self) -> TuneReport:
        """Tune."""
        if self.runtime.idle:
            note = "all experts are in memory: there is nothing to cache, predict or read ahead"
            return self._report(None, None, (), 0, (note,))
        first = self._first_run()
        with tempfile.TemporaryDirectory(prefix="gangline-tune-") as folder:
            trace = self._trace(Path(folder) / "trace")
            self.say("simulating")
            rows, notes = self._simulate(trace, first)
            tokens = len(trace)
        names = [row.policy for row in rows[: self.settings.best]]
        confirmed = list(dict.fromkeys(["default", *names]))
        live = self._live(confirmed)
        candidates = tuple(_candidate(row, live.get(row.policy), live["default"]) for row in rows)
        choice = self._choose(candidates)
        stored = self._store(choice, candidates) if self.settings.store else None
        return self._report(choice.name, stored, candidates, tokens, notes)

    def _first_run(self) -> LiveRun:
        """Run the default: it warms the machine up and shows its speed."""
        self.say("a first run")
        run_live(self.model, self.pieces[:1])
        return run_live(self.model, self.pieces[1:2] or self.pieces[:1])

    def _trace(self, folder: Path) -> Trace:
        if self.settings.trace is not None:
            trace = open_trace(self.settings.trace)
            require_trace_of(trace.header, self.runtime.view, trace.name)
            return trace
        self.say("recording")
        pieces = self.pieces[: self.settings.pieces]
        return record_pieces(self.model, self.name, pieces, folder, tokenizer=self.tokenizer)

    def _simulate(self, trace: Trace, first: LiveRun) -> tuple[list[SimReport], tuple[str, ...]]:
        """Return the compositions by modelled speed, and notes on those left out."""
        settings = SimulationSettings(
            policies=(),
            capacities=(str(self.runtime.plan.experts_resident),),
            systems=(ALL,),
            oracles=(),
            calibration=self._calibration(),
        )
        settings = at_speed_of(first, settings, trace.header.geometry.layers)
        result = simulate_trace(trace, settings, model=self._parts())
        rows = [row for row in result.rows if not row.policy.startswith("belady")]
        left_out = tuple(note for note in result.notes if "left out" in note)
        return sorted(rows, key=lambda row: -(row.tokens_per_second or 0.0)), left_out

    def _learned_trace(self) -> bool:
        return self.settings.predictor is not None and Path(self.settings.predictor).expanduser().is_dir()

    def _calibration(self) -> Trace | None:
        return open_trace(Path(str(self.settings.predictor)).expanduser()) if self._learned_trace() else None

    def _parts(self) -> ModelParts:
        if self.settings.predictor is None or self._learned_trace():
            return model_parts(self.model)
        from gangline.policies.predictors.identity import require_same_model
        from gangline.policies.predictors.saved import load_predictor

        saved = load_predictor(self.settings.predictor)
        require_same_model(saved.about, self.runtime.view, self.settings.predictor)
        return model_parts(self.model, saved.network, saved.kind)

    def _live(self, names: Sequence[str]) -> dict[str, list[LiveRun]]:
        """Run the candidates in turns, each round with other pieces."""
        runs: dict[str, list[LiveRun]] = {name: [] for name in names}
        for number in range(self.settings.rounds):
            warm, timed = self._pair(number)
            order = [*names[number % len(names) :], *names[: number % len(names)]]
            for name in order:
                self.say(f"round {number + 1} of {self.settings.rounds}: {name}")
                self.runtime.use_policy(name, self._learned_by(name))
                run_live(self.model, [warm])
                runs[name].append(run_live(self.model, [timed]))
        return runs

    def _pair(self, number: int) -> tuple[Piece, Piece]:
        pieces = self.pieces
        return pieces[2 * number % len(pieces)], pieces[(2 * number + 1) % len(pieces)]

    def _learned_by(self, name: str) -> str | None:
        """Return ``predictor`` where the composition learns from it."""
        from gangline.policies.compositions import composition
        from gangline.policies.parts import LEARNED

        found = composition(name)
        wants = found.cache == "static-hot" if self._learned_trace() else found.predictor in LEARNED
        return self.settings.predictor if wants else None

    def _choose(self, candidates: Sequence[Candidate]) -> PolicyChoice:
        confirmed = [item for item in candidates if item.ratio is not None]
        best = max(confirmed, key=lambda item: item.ratio or 0.0)
        if best.name == DEFAULT.name or (best.ratio or 0.0) < _MARGIN:
            return DEFAULT
        choice = asked_policy(best.name, self._learned_by(best.name))
        assert choice is not None
        return choice

    def _store(self, choice: PolicyChoice, candidates: Sequence[Candidate]) -> str:
        plan = self.runtime.plan
        file = tuned_file(self.runtime.identity, plan.precision, plan.budget)
        live = [asdict(item) for item in candidates if item.ratio is not None]
        store_tuned(file, choice, {"model": self.name, "memory": plan.budget, "candidates": live})
        return str(file)

    def _report(
        self,
        choice: str | None,
        stored: str | None,
        candidates: tuple[Candidate, ...],
        tokens: int,
        notes: tuple[str, ...],
    ) -> TuneReport:
        plan = self.runtime.plan
        return TuneReport(
            model=self.name,
            precision=plan.precision,
            memory=plan.budget,
            slots=plan.experts_resident,
            experts=plan.experts_total,
            choice=choice,
            stored=stored,
            candidates=candidates,
            trace_tokens=tokens,
            notes=notes,
        )


def _candidate(row: SimReport, runs: list[LiveRun] | None, default: list[LiveRun]) -> Candidate:
    simulated = (row.tokens_per_second, row.hit_rate, row.levels[0].bytes_per_token)
    if not runs:
        return Candidate(row.policy, *simulated)
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, default, strict=True)]
    hits, misses = sum(run.hits for run in runs), sum(run.misses for run in runs)
    return Candidate(
        row.policy,
        *simulated,
        tokens_per_second=tuple(run.tokens_per_second for run in runs),
        ratio=statistics.median(ratios),
        hit_rate=hits / (hits + misses) if hits + misses else None,
    )
