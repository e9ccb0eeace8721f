"""Every cache and every composition on traces of `demo`: simulated and live, beside Belady.

    python benchmarks/policies_live.py --text english=FILE --text code=FILE --text german=FILE \\
        --out benchmarks/results/policies_live.json

Pieces of each text (a prompt and the tokens that follow it, forced) are recorded once. For rho = 1, 2, 3
(expert slots of a layer over the experts of a token) every cache and every exact composition is simulated on
the trace with the speed that one run of the default shows, and every composition runs the same pieces live,
in turns, each time from an empty cache. `fiddler` learns from other pieces of the same text; learned
predictors are left out unless `--predictor FILE` brings one trained by `gangline predict train`.

"hit rate" and "read" rows: ours is the live engine, the peer the simulator's prediction. `bound_share` of a
hit rate is the share of the hits of Belady's clairvoyant cache; compositions that read ahead have none. A
composition's tokens/s stand beside the default's of the same rounds.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gangline
from gangline.benchmarks.result import Row, compare, running_command, write_result
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
from gangline.evaluation.simulation import SimulationSettings, simulate_trace
from gangline.policies.caches import CACHES
from gangline.policies.compositions import COMPOSITIONS
from gangline.policies.parts import LEARNED
from gangline.policies.predictors.saved import load_predictor
from gangline.traces import Trace
from gangline.traces.simulator import SimReport

PUBLISHED = {"lru": (56.0, 67.0, 75.0), "lfu": (62.0, 71.0, 78.0)}
"""Share of the clairvoyant hit rate at rho 1, 2, 3 in "Not All Models Suit Expert Offloading" (arXiv
2505.16056)."""
CLAIRVOYANT = {"belady", "belady-bypass", "window-oracle"}
ONE_SCOPE = {"layer-lru", "fate", "random", "static-hot"}
MIB = 2**20


class Study:
    """One text: its pieces, its traces, and the rows that they give."""

    def __init__(self, arguments: argparse.Namespace, name: str, text: Path, folder: Path) -> None:
        self.arguments, self.name, self.folder = arguments, name, folder
        self.learned = {saved.kind: (path, saved) for path, saved in arguments.learned}
        checkpoint = find_checkpoint(arguments.model)
        self.tokenizer = load_tokenizer(checkpoint)
        lengths = {"prompt": arguments.prompt_tokens, "following": arguments.new_tokens}
        vocabulary = 1 if self.tokenizer else 256
        pieces = cut_pieces(self.tokenizer, vocabulary, [text], **lengths, count=2 * arguments.pieces)
        self.pieces, self.others = pieces[1::2], pieces[::2]

    def rows(self) -> list[Row]:
        """All budgets."""
        model: Any = gangline.load(self.arguments.model, progress=False, policy="default")
        with model.gangline:
            trace = self._record(model, self.pieces, "trace")
            other = self._record(model, self.others, "other")
            active = model.gangline.geometry.active_experts
        rows: list[Row] = []
        for rho in self.arguments.rho:
            slots = round(rho * active)
            model = gangline.load(self.arguments.model, progress=False, policy="default", expert_slots=slots)
            with model.gangline:
                rows += self._budget(model, trace, other, rho, slots)
            if self.arguments.out is not None:  # what is there is kept if a later budget fails
                self.arguments.done(rows)
        return rows

    def _record(self, model: Any, pieces: Sequence[Piece], place: str) -> Trace:
        folder = self.folder / f"{self.name}-{place}"
        return record_pieces(model, self.arguments.model, pieces, folder, tokenizer=self.tokenizer)

    def _budget(self, model: Any, trace: Trace, other: Trace, rho: float, slots: int) -> list[Row]:
        """Rows of one number of slots."""
        run_live(model, self.others[:1])
        first = run_live(model, self.others[-1:])
        names = self._systems()
        caches = [name for name in CACHES if name not in CLAIRVOYANT]
        caches += [f"{name}@global" for name in caches if name not in ONE_SCOPE]
        simulated: dict[str, SimReport] = {}
        for system in names:
            settings = SimulationSettings((), (str(slots),), systems=(system,), oracles=(), calibration=other)
            settings = at_speed_of(first, settings, trace.header.geometry.layers)
            _, saved = self.learned.get(COMPOSITIONS[system].predictor, (None, None))
            parts = model_parts(model, saved and saved.network, saved and saved.kind)
            simulated[system] = simulate_trace(trace, settings, model=parts).rows[0]
        settings = SimulationSettings(caches, (str(slots),), calibration=other)
        alone = simulate_trace(trace, settings, model=model_parts(model)).rows
        live = self._live(model, names)
        work = f"{self.arguments.model}, {self.name}, rho {rho:g}"
        rows = [row for report in alone for row in self._cache_rows(f"{work}, {report.policy}", report, rho)]
        for system in names:
            rows += system_rows(f"{work}, {system}", simulated, live, system)
        return rows

    def _systems(self) -> list[str]:
        return [
            name
            for name, found in COMPOSITIONS.items()
            if found.exact and (found.predictor not in LEARNED or found.predictor in self.learned)
        ]

    def _live(self, model: Any, names: Sequence[str]) -> dict[str, list[LiveRun]]:
        runs: dict[str, list[LiveRun]] = {name: [] for name in names}
        for number in range(self.arguments.rounds):
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                found = COMPOSITIONS[name]
                path = self.learned.get(found.predictor, (None, None))[0]
                if found.cache == "static-hot":
                    path = self.folder / f"{self.name}-other"
                model.gangline.use_policy(name, None if path is None else str(path))
                runs[name].append(run_live(model, self.pieces))
                shown = runs[name][-1]
                speed = f"{shown.tokens_per_second:.2f} tokens/s, hit rate {shown.hit_rate:.3f}"
                print(f"{self.name}, round {number + 1}, {name}: {speed}", flush=True)
        return runs

    @staticmethod
    def _cache_rows(work: str, report: SimReport, rho: float) -> list[Row]:
        """A cache by itself, simulated."""
        shared: dict[str, Any] = {"kind": "simulated", "bound_share": report.of_belady}
        rate = 100 * (report.hit_rate or 0.0)
        rows = [Row(f"{work} (cache alone)", "hit rate, %", rate, **shared)]
        published = PUBLISHED.get(report.policy)
        if published is not None and rho in (1, 2, 3) and report.of_belady is not None:
            share = 100 * report.of_belady
            rows.append(
                Row(
                    f"{work} (cache alone)",
                    "hits, % of Belady's",
                    share,
                    "arXiv 2505.16056, mean of its models",
                    published[int(rho) - 1],
                    kind="simulated",
                )
            )
        return rows


def system_rows(
    work: str, simulated: dict[str, SimReport], live: dict[str, list[LiveRun]], name: str
) -> list[Row]:
    """One composition at one budget."""
    report, runs = simulated[name], live[name]
    tokens = runs[0].tokens
    hits = [100 * (run.hit_rate or 0.0) for run in runs]
    read = [run.bytes_read / tokens / MIB for run in runs]
    speeds = [run.tokens_per_second for run in runs]
    default = [run.tokens_per_second for run in live["default"]]
    shares = [] if report.of_belady is None else [report.of_belady]
    modelled, base = report.tokens_per_second, simulated["default"].tokens_per_second
    ratio = None if modelled is None or not base else modelled / base
    peer = "simulator"
    return [
        compare(work, "hit rate, %", hits, peer, [100 * (report.hit_rate or 0.0)], bound_shares=shares),
        compare(
            work,
            "bytes read per token, MiB",
            read,
            peer,
            [report.levels[0].bytes_per_token / MIB],
            higher_is_better=False,
        ),
        compare(work, "tokens/s", speeds, "default, same rounds", default),
        Row(
            work,
            "tokens/s, modelled",
            modelled,
            "default, modelled",
            base,
            ratio=ratio,
            bound_share=report.bound_share,
            kind="simulated",
        ),
    ]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--predictor", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    texts = [text.partition("=") for text in arguments.text]
    if not all(name and path for name, _, path in texts):
        parser.error("--text wants NAME=FILE")
    arguments.texts = [(name, Path(path)) for name, _, path in texts]
    arguments.learned = [(path, load_predictor(path)) for path in arguments.predictor]
    return arguments


def main() -> None:
    """Study every text and write the result."""
    arguments = parse()
    torch.set_num_threads(1)
    rows: list[Row] = []

    def write(more: list[Row]) -> None:
        hide = {"--text": "NAME=FILE", "--predictor": "FILE"}
        write_result(arguments.out.stem, rows + more, running_command(hide), folder=arguments.out.parent)

    arguments.done = write
    with tempfile.TemporaryDirectory() as folder:
        for name, path in arguments.texts:
            rows += Study(arguments, name, path, Path(folder)).rows()


if __name__ == "__main__":
    main()
