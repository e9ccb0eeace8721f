"""Experts between RAM and disk: gangline's policies and llama.cpp's mmap in the same memory.

    python benchmarks/ram_disk.py --folder shapes --text FILE --out benchmarks/results/ram_disk.json

Makes the random checkpoint of the OLMoE-1B-7B shape and its Q4_0 GGUF in --folder if they are missing. For
each share of --fractions the budget is what our plan needs to keep that share of the experts in memory
(``--of file``: that share of the bytes of the GGUF, or the smallest budget that works). Every side runs in a
process of its own, in a control group limited to that budget, with the page cache emptied before and the
disk measured around it; the sides take turns in every round. llama.cpp gets the read-ahead of --read-aheads
that decodes fastest in a try of its own.

Routing of random weights is uniform. The second part replays routing of the trained `demo` on --text: its
layers at the same relative depth, each of its 16 experts standing for a fixed group of 4, so that its top 2
are the model's top 8. llama.cpp cannot follow a trace; there the policies stand beside plain LRU.

`lru` (one list for all layers) reads nothing ahead, `default` what the next two routers want, and
`moe-infinity` what earlier sequences used; --also adds others to the uniform part, for example hobbit-exact,
and hobbit with its two precisions, which is approximate: it may read copies in int2 or leave experts out.
--tune lets ``gangline tune`` choose for each budget first and runs its choice too. "share of the bound":
bytes read over the fastest random reads of expert size that the disk showed anywhere at that budget, a side
at work included. Needs Linux
and root, and: pip install "gangline[gguf]" llama-cpp-python
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import native_vs_peers
import numpy as np
import offload_vs_peers
from offload_vs_peers import Run

import gangline
from gangline.benchmarks.confine import run_confined
from gangline.benchmarks.replay import load_trace, spread_trace
from gangline.benchmarks.result import Row, compare, running_command, write_result
from gangline.benchmarks.shapes import shape_config
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.sizes import format_size
from gangline.evaluation.plain import find_checkpoint, load_tokenizer
from gangline.evaluation.policy_runs import cut_pieces, record_pieces
from gangline.policies.compositions import COMPOSITIONS

PROMPT = native_vs_peers.DECODE_PROMPT
MIB = 2**20
SLACK = 8 * MIB  # a process does not begin equally large every time
PLAIN = {"lru": "cache: lru\nscope: global\n"}
PEER = "llamacpp"


class Study:
    """The sides at one budget."""

    def __init__(self, arguments: argparse.Namespace, fraction: float, folder: Path) -> None:
        self.arguments, self.fraction, self.folder = arguments, fraction, folder
        self.model = native_vs_peers.checkpoint(arguments.olmoe, arguments)
        self.gguf = native_vs_peers.gguf_of(self.model, "q4_0", arguments)
        config = shape_config(arguments.olmoe)
        self.experts = config.num_hidden_layers * config.num_experts
        plan = self._plan()
        self.memory: int = plan["peak"] + SLACK
        self.name = f"{arguments.olmoe} int4, {plan['resident_share']:.0%} resident"
        self.settings = offload_vs_peers.settings_in(self.memory, self.model, self.gguf, PROMPT, arguments)
        print(f"{self.name}: {format_size(self.memory)}", flush=True)

    def _plan(self) -> dict[str, Any]:
        """Our plan for this share, made by a process as fresh as the ones that will follow it."""
        asked: dict[str, Any] = {"expert_slots": round(self.fraction * self.experts)}
        memory = None
        if self.arguments.of == "file":
            asked, memory = {}, round(self.fraction * self.gguf.stat().st_size) - SLACK
            smallest = self._planned(self.gguf.stat().st_size)["smallest"]
            memory = max(memory, smallest + SLACK)
        found = self._planned(memory, **asked)
        return found | ({} if memory is None else {"peak": memory})

    def _planned(self, memory: int | None, **asked: Any) -> dict[str, Any]:
        settings = offload_vs_peers.settings_in(0, self.model, self.gguf, PROMPT, self.arguments)
        settings.memory = memory
        return report_of("plan", settings, **asked)

    def tuned(self) -> str | None:
        """What ``gangline tune`` chooses in this memory."""
        found = report_of("tune", self.settings, rounds=self.arguments.tune)
        print(f"{self.name}: tune chose {found['choice']} of {len(found['candidates'])}", flush=True)
        return found["choice"]

    def runs(self, sides: list[str], replay: list[Path] | None = None) -> dict[str, list[Run]]:
        """Every side in turns, once in every round, or once for every file of ids to replay."""
        done: dict[str, list[Run]] = {name: [] for name in sides}
        for number in range(self.arguments.rounds if replay is None else len(replay)):
            names = list(done)
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                more: dict[str, Any] = {}
                if name != PEER:
                    mixed = name in COMPOSITIONS and COMPOSITIONS[name].precision is not None
                    more = {"policy": self._policy(name), "mode": "mixed" if mixed else "hint"}
                    more["replay"] = None if replay is None else str(replay[number])
                run = offload_vs_peers.run_side("ours" if name != PEER else PEER, self.settings, **more)
                if run is None:
                    raise SystemExit(f"{self.name}: {name} did not come to an end")
                done[name].append(run)
        return done

    def _policy(self, name: str) -> str:
        if name not in PLAIN:
            return name
        path = self.folder / f"{name}.yaml"
        path.write_text(PLAIN[name])
        return str(path)


def report_of(side: str, settings: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Run one job of ``sides.py`` without a limit and return its report."""
    job = offload_vs_peers.job_of(side, settings, **more)
    env = {"OMP_NUM_THREADS": str(settings.threads)}
    seen = run_confined(offload_vs_peers.side_command(job), env=env, timeout=settings.timeout)
    if seen.report is None:
        raise SystemExit(f"{side} ended with {seen.returncode} before a result\n{seen.stderr_tail}")
    return seen.report


def best_read_ahead(study: Study, choices: list[int]) -> int:
    """Return the read-ahead in KiB with which llama.cpp decodes fastest in one short try each."""
    speeds = {}
    for kib in choices:
        settings = argparse.Namespace(**vars(study.settings) | {"read_ahead": kib})
        run = offload_vs_peers.run_side(PEER, settings)
        speeds[kib] = 0.0 if run is None else run.decode_speed
        print(f"read-ahead {kib} KiB: {speeds[kib]:.2f} tokens/s", flush=True)
    return max(choices, key=lambda kib: speeds[kib])


def hit_rate(run: Run) -> float:
    """Hits of our decoding, in percent of the experts of events."""
    stats = run.decode_stats
    return 100 * stats["host_hits"] / (stats["host_hits"] + stats["host_misses"])


def approximate_rows(case: str, runs: list[Run]) -> list[Row]:
    """Shares of experts in low precision and left out, of all that routers chose."""
    rows = []
    for what, names in (("in low precision", ("low_hits", "low_misses")), ("left out", ("skipped",))):
        shares = [
            100
            * sum(run.decode_stats[name] for name in names)
            / sum(run.decode_stats[name] for name in ("host_hits", "host_misses", "skipped"))
            for run in runs
        ]
        rows.append(compare(case, f"experts {what}, %", shares))
    return rows


def rows_of(work: str, runs: Mapping[str, list[Run]], beside: str, peer: str) -> list[Row]:
    """Every side of ours beside the one called ``beside``, which rows call ``peer``."""
    disk = offload_vs_peers.most_shown(run for done in runs.values() for run in done)
    theirs = runs[beside]
    rows = [Row(f"{work}, disk", "GB/s, most of random reads of an expert's size", disk / 1e9)]
    for name, ours in runs.items():
        if name == PEER:
            continue
        speeds, others = [run.decode_speed for run in ours], [run.decode_speed for run in theirs]
        against = None if name == beside else peer
        case = f"{work}, {name}"
        shares = [run.decode_rate / disk for run in ours]
        rows.append(
            compare(case, "decode, tokens/s", speeds, against, others if against else [], bound_shares=shares)
        )
        if against:
            ratios = [a / b for a, b in zip(speeds, others, strict=True)]
            rows.append(compare(case, f"times {peer}'s tokens/s", ratios))
        rows.append(compare(case, "hit rate, %", [hit_rate(run) for run in ours]))
        if name in COMPOSITIONS and COMPOSITIONS[name].precision is not None:
            rows += approximate_rows(case, ours)
        read = [run.decode_bytes / MIB for run in ours]
        both = against is not None and all(read)  # no ratio to a side that found everything in memory
        read_theirs = [run.decode_bytes / MIB for run in theirs] if both else []
        rows.append(
            compare(
                case,
                "MiB read per token",
                read,
                against if both else None,
                read_theirs,
                higher_is_better=False,
            )
        )
        rows.append(
            compare(
                case,
                "share of the disk's bandwidth right before and after",
                [run.decode_rate / run.disk.best for run in ours],
            )
        )
    return rows


def record_demo(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """Record a piece of text on `demo` for every round; return files of ids, stretched over the shape."""
    config = shape_config(arguments.olmoe)
    layer = LayerGeometry(config.num_experts, config.num_experts_per_tok, 1, 1)
    geometry = MoEGeometry((layer,) * config.num_hidden_layers)
    tokenizer = load_tokenizer(find_checkpoint("demo"))
    pieces = cut_pieces(
        tokenizer,
        0,
        [arguments.text],
        prompt=PROMPT,
        following=arguments.new_tokens + 1,
        count=arguments.replay_rounds,
    )
    model: Any = gangline.load("demo", progress=False, policy="default")
    paths = []
    with model.gangline:
        for number, piece in enumerate(pieces):
            place = folder / f"trace-{number}"
            record_pieces(model, "demo", [piece], place, tokenizer=tokenizer, full=False)
            paths.append(folder / f"ids-{number}.npy")
            np.save(paths[-1], spread_trace(load_trace(place), geometry).ids_NLK)
    return paths


def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    """Both parts at every budget."""
    studies = [Study(arguments, fraction, folder) for fraction in arguments.fractions]
    middle = studies[len(studies) // 2]
    if len(arguments.read_aheads) > 1:
        arguments.read_ahead = best_read_ahead(middle, arguments.read_aheads)
    peer = f"llama.cpp mmap, read-ahead {arguments.read_ahead} KiB"
    replays = record_demo(arguments, folder) if arguments.text else None
    rows: list[Row] = []
    for study in studies:
        shown = len(rows)
        study.settings.read_ahead = arguments.read_ahead
        policies = ["default", "lru", *arguments.also]
        chosen = study.tuned() if arguments.tune else None
        policies = list(dict.fromkeys([*policies, *([] if chosen is None else [chosen])]))
        work = f"{study.name} ({format_size(study.memory)}), uniform routing"
        rows += rows_of(work, study.runs([*policies, PEER]), PEER, peer)
        if replays is not None:
            names = ["default", "lru", *arguments.ahead]
            if chosen is not None:
                names.append(chosen)
            runs = study.runs(list(dict.fromkeys(names)), replays)
            work = f"{study.name} ({format_size(study.memory)}), routing of demo"
            rows += rows_of(work, runs, "lru", "plain LRU")
        for row in rows[shown:]:
            print(native_vs_peers.describe(row), flush=True)
    return rows


def main() -> None:
    """Measure and write the result."""
    arguments = parse()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    if arguments.out is not None:
        machine = {"threads": arguments.threads, "peer_read_ahead_kib": arguments.read_ahead}
        command = running_command({"--folder": "FOLDER", "--text": "FILE", "--out": "FILE.json"})
        print(write_result(arguments.out.stem, rows, command, folder=arguments.out.parent, machine=machine))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where checkpoint and GGUF file lie, or are made")
    add("--text", type=Path, help="text that demo reads; without it nothing is replayed")
    add("--fractions", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    add("--of", choices=("experts", "file"), default="experts", help="what they are shares of")
    add("--ahead", nargs="*", default=["moe-infinity"], help="policies that read ahead, for the replay")
    add("--also", nargs="*", default=[], help="other policies for the uniform part; hobbit is approximate")
    add("--tune", type=int, default=0, metavar="ROUNDS", help="let gangline tune choose with so many rounds")
    add("--read-aheads", type=int, nargs="+", default=[64, 128, 512], help="KiB to try for llama.cpp")
    add("--rounds", type=int, default=2, help="of the uniform part")
    add("--replay-rounds", type=int, default=1, help="of the replay, each with another piece of the text")
    add("--new-tokens", type=int, default=24, help="tokens decoded behind a prompt of 16")
    add("--olmoe", default="olmoe-1b-7b", help="shape; cut it for a try, for example olmoe-1b-7b:2")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="result file, for example benchmarks/results/ram_disk.json")
    arguments = parser.parse_args()
    arguments.read_ahead = arguments.read_aheads[0]
    return arguments


if __name__ == "__main__":
    main()
