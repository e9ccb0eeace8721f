"""Does replaying a trace predict what the engine does? Every exact composition on `demo` at three budgets,
and HOBBIT in two precisions.

    python benchmarks/simulator_vs_live.py --text english=FILE --pieces 3 --new-tokens 32 \\
        --out benchmarks/results/simulator_vs_live.json

Pieces of a text (a prompt and the tokens that follow it, forced) are recorded once. For each number of slots
a model is loaded, and every composition runs the pieces live from an empty cache and is simulated on the
trace with the speed that a run of the default shows. "ours" of a hit rate is the simulated value, the peer
the live engine's; a hit is an expert of a routing event that has a slot when the event comes. "events that
differ" counts events whose hits are not the very same experts. Which experts have slots depends on events
and policies alone; how many hits were still on their way ("late") and how many bytes of reads ahead that came
to nothing had begun depend on speed as well.

Two precisions change what later layers choose, so there the trace is recorded under the policy itself, at
each budget. The two experts of a token of `demo` weigh alike: only a T1 below 0.5 computes any in low
precision.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import gangline
from gangline.benchmarks.result import Row, running_command, write_result
from gangline.evaluation.plain import find_checkpoint, load_tokenizer
from gangline.evaluation.policy_runs import (
    LiveRun,
    Piece,
    at_speed_of,
    cut_pieces,
    model_parts,
    record_pieces,
    run_live,
)
from gangline.evaluation.simulation import ModelParts, SimulationSettings, simulate_trace
from gangline.policies.compositions import COMPOSITIONS
from gangline.policies.parts import LEARNED
from gangline.policies.predictors.saved import load_predictor
from gangline.runtime.lease import EventLease
from gangline.traces import Trace
from gangline.traces.simulator import SimReport
from gangline.traces.simulator.level import Level

MIB = 2**20


@dataclass
class Hits:
    """The hits of every event, live and simulated, in the order of the passes."""

    live: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    simulated: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Listen while the block runs."""
        count, note = EventLease._count, Level.note

        def counted(lease: EventLease, event: Any, present: set[int]) -> None:
            self.live.append((event.layer, tuple(sorted(present))))
            count(lease, event, present)

        def noted(level: Level, event: Any, *of_two: Any) -> tuple[int, ...]:
            found = note(level, event, *of_two)
            self.simulated.append((event.layer, found))
            return found

        EventLease._count, Level.note = counted, noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            EventLease._count, Level.note = count, note  # type: ignore[method-assign]

    @property
    def different(self) -> int:
        """Events whose hits differ; the simulator may have replayed more runs behind the first."""
        return sum(a != b for a, b in zip(self.live, self.simulated, strict=False))


class Study:
    """One text."""

    def __init__(self, arguments: argparse.Namespace, name: str, path: Path, folder: Path) -> None:
        self.arguments, self.name, self.folder = arguments, name, folder
        self.tokenizer = load_tokenizer(find_checkpoint("demo"))
        lengths = {"prompt": arguments.prompt_tokens, "following": arguments.new_tokens}
        pieces = cut_pieces(self.tokenizer, 0, [path], **lengths, count=2 * arguments.pieces)
        self.pieces, self.others = pieces[1::2], pieces[::2]
        self.learned = {saved.kind: (path, saved) for path, saved in arguments.learned}

    def rows(self) -> list[Row]:
        """All budgets."""
        model: Any = gangline.load("demo", progress=False, policy="default")
        with model.gangline:
            trace = self._record(model, self.pieces, "trace")
            other = self._record(model, self.others, "other")
            active = model.gangline.geometry.active_experts
        rows: list[Row] = []
        for rho in self.arguments.rho:
            slots = round(rho * active)
            model = gangline.load("demo", progress=False, policy="default", expert_slots=slots)
            with model.gangline:
                run_live(model, self.others[:1])
                first = run_live(model, self.others[-1:])
                for name, found in COMPOSITIONS.items():
                    if not found.exact or (
                        found.predictor in LEARNED and found.predictor not in self.learned
                    ):
                        continue
                    settings = SimulationSettings(
                        (), (str(slots),), systems=(name,), oracles=(), calibration=other
                    )
                    settings = at_speed_of(first, settings, trace.header.geometry.layers)
                    rows += self._compared(model, trace, name, settings, f"rho {rho:g}")
            rows += self._of_two_precisions(slots, first, f"rho {rho:g}")
        return rows

    def _of_two_precisions(self, slots: int, first: LiveRun, budget: str) -> list[Row]:
        """Rows of HOBBIT with copies of experts in low precision; its trace is its own."""
        high, low = self.arguments.thresholds
        file = self.folder / f"{self.name}-{slots}.yaml"
        file.write_text(f"like: hobbit\nprecision: {{name: HobbitPrecision, high: {high}, low: {low}}}\n")
        mixed = {"policy": str(file), "mode": "mixed"}
        model: Any = gangline.load("demo", progress=False, expert_slots=slots, **mixed)
        with model.gangline as runtime:
            trace = self._record(model, self.pieces, f"mixed-{slots}")
            runtime.use_policy(str(file), mode="mixed")  # what is computed depends on what is there: afresh
            pools = runtime.plan.slots, runtime.plan.low_slots
            of_both = tuple(sum(count for _, count, _ in pool) for pool in pools)
            settings = SimulationSettings(
                (), (str(slots),), systems=(str(file),), oracles=(), slots_of_both=of_both
            )
            settings = at_speed_of(first, settings, trace.header.geometry.layers)
            work = f"demo, {self.name}, {budget}, hobbit in two precisions (T1 {high:g}, T2 {low:g})"
            before = runtime.stats()
            rows, report = self._ran(model, trace, settings, model_parts(model), work)
            after = runtime.stats()
        for count in ("low_hits", "low_misses", "skipped"):
            counted = sum(phase[count] for phase in report.phases.values())
            seen = getattr(after, count) - getattr(before, count)
            words = count.replace("_", " ").replace("low ", "low-precision ")
            rows.append(Row(work, f"{words}, experts", counted, "live engine", seen, kind="simulated"))
        return rows

    def _record(self, model: Any, pieces: list[Piece], place: str) -> Trace:
        folder = self.folder / f"{self.name}-{place}"
        return record_pieces(model, "demo", pieces, folder, tokenizer=self.tokenizer)

    def _compared(
        self, model: Any, trace: Trace, name: str, settings: SimulationSettings, budget: str
    ) -> list[Row]:
        """Rows of one composition at one budget."""
        composition = COMPOSITIONS[name]
        path, saved = self.learned.get(composition.predictor, (None, None))
        if composition.cache == "static-hot":
            path = self.folder / f"{self.name}-other"
        model.gangline.use_policy(name, None if path is None else str(path))
        parts = model_parts(model, saved and saved.network, saved and saved.kind)
        return self._ran(model, trace, settings, parts, f"demo, {self.name}, {budget}, {name}")[0]

    def _ran(
        self, model: Any, trace: Trace, settings: SimulationSettings, parts: ModelParts, work: str
    ) -> tuple[list[Row], SimReport]:
        """Rows of the policy that the model has, and what was simulated."""
        hits, late = Hits(), model.gangline.store.stats.late
        with hits.noted():
            live = run_live(model, self.pieces)
            late = model.gangline.store.stats.late - late
            report = simulate_trace(trace, settings, model=parts).rows[0]
        moved = report.levels[0].bytes_moved
        peer = "live engine"
        simulated, seen = 100 * (report.hit_rate or 0.0), 100 * (live.hit_rate or 0.0)
        share = 100 / (live.hits + live.misses)
        late_simulated = sum(counts["late"] for counts in report.phases.values())
        print(f"{work}: {simulated:.2f} simulated, {seen:.2f} live, {hits.different} events", flush=True)
        kind: dict[str, Any] = {"kind": "simulated"}
        rows = [
            Row(work, "hit rate, %", simulated, peer, seen, **kind),
            Row(work, "off by, points", abs(simulated - seen), **kind),
            Row(work, f"events that differ, of {len(hits.live)}", float(hits.different), **kind),
            Row(
                work,
                "late hits, % of the experts of events",
                share * late_simulated,
                peer,
                share * late,
                **kind,
            ),
            Row(work, "bytes read, MiB", sum(moved.values()) / MIB, peer, live.bytes_read / MIB, **kind),
        ]
        return rows, report


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--predictor", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument(
        "--thresholds", type=float, nargs=2, default=[0.25, 1.0], help="T1 and T2 of two precisions"
    )
    parser.add_argument("--pieces", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    texts = [text.partition("=") for text in arguments.text]
    if not all(name and path for name, _, path in texts):
        parser.error("--text wants NAME=FILE")
    arguments.texts = [(name, Path(path)) for name, _, path in texts]
    arguments.learned = [(path, load_predictor(path)) for path in arguments.predictor]
    return arguments


def main() -> None:
    """Record, run, replay, and write the result."""
    arguments = parse()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in arguments.texts:
            rows += Study(arguments, name, path, Path(folder)).rows()
    if arguments.out is not None:
        command = running_command({"--text": "NAME=FILE", "--predictor": "FILE"})
        write_result(arguments.out.stem, rows, command, folder=arguments.out.parent)


if __name__ == "__main__":
    main()
