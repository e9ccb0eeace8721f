"""A 13.8 GB mixture of experts in 6 GiB: gangline, transformers with disk offload, and llama.cpp with mmap.

    python benchmarks/offload_vs_peers.py --model FOLDER --rounds 3 \
        --out benchmarks/results/offload_vs_peers.json

Makes the random checkpoint of the OLMoE-1B-7B shape and its GGUF if they are missing, then runs the sides in
turns: each in a fresh process, in a control group limited to the same memory, with the page cache emptied
before and the disk's bandwidth measured around it. All sides read the same token ids: a prompt, then tokens
fed one by one. Needs Linux and root, and: pip install "gangline[gguf]" accelerate llama-cpp-python
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.benchmarks.confine import Confined, drop_page_cache, read_ahead, run_confined
from gangline.benchmarks.result import Row, compare, running_command, write_result
from gangline.benchmarks.roofline import Beside, beside_disk
from gangline.core.sizes import format_size, parse_size

SIDES = ("ours", "llamacpp", "transformers")
PEER_NAMES = {"llamacpp": "llama.cpp mmap", "transformers": "transformers disk offload"}
SPEC = "olmoe-1b-7b"
EXPERT_BYTES = 3 * 1024 * 2048 * 2


@dataclass(frozen=True)
class Run:
    """One run of one side that came to its end."""

    seen: Confined
    disk: Beside
    load_seconds: float
    prefill: dict[str, dict[str, float]]
    decode: list[dict[str, float]]

    @property
    def decode_speed(self) -> float:
        """Tokens/s over all decoded tokens."""
        return len(self.decode) / sum(step["seconds"] for step in self.decode)

    @property
    def decode_bytes(self) -> float:
        """Bytes from the disk per token."""
        return statistics.fmean(step["bytes"] for step in self.decode)

    @property
    def decode_stats(self) -> dict[str, float]:
        """What the side itself counted while decoding behind the last prompt."""
        report = self.seen.report or {}
        before = report.get("stats_before_decode") or {}
        return {
            name: value - before[name]
            for name, value in (report.get("stats") or {}).items()
            if isinstance(before.get(name), int | float)
        }

    @property
    def decode_rate(self) -> float:
        """Bytes/s from the disk while decoding."""
        return self.decode_bytes * self.decode_speed

    def prefill_speed(self, length: str) -> float:
        """Tokens/s of the prompt of that length."""
        return int(length) / self.prefill[length]["seconds"]

    def prefill_rate(self, length: str) -> float:
        """Bytes/s from the disk while reading the prompt."""
        return self.prefill[length]["bytes"] / self.prefill[length]["seconds"]


def settings_in(
    memory: int, model: Path, gguf: Path, prompt: int, args: argparse.Namespace
) -> argparse.Namespace:
    """Return what :func:`run_side` needs to run ours in int4, or llama.cpp on ``gguf``, within ``memory``."""
    return argparse.Namespace(
        model=model,
        gguf=gguf,
        memory=memory,
        limit=memory,
        precision="int4",
        offload_cpu="",
        offload_folder="",
        prompts=[prompt],
        decode=args.new_tokens,
        seed=args.seed,
        threads=args.threads,
        read_ahead=args.read_ahead,
        timeout=1800,
    )


def job_of(side: str, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return what ``sides.py`` is told of one side; ``more`` goes along."""
    return {
        "side": side,
        "model": str(args.model),
        "gguf": str(args.gguf),
        "memory": args.memory,
        "offload_cpu": args.offload_cpu,
        "offload_folder": str(args.offload_folder),
        "prompts": args.prompts,
        "decode": args.decode_slow if side == "transformers" else args.decode,
        "context": max(args.prompts) + args.decode,
        "seed": args.seed,
        "vocab": json.loads((args.model / "config.json").read_text())["vocab_size"],
        "threads": args.threads,
        "precision": args.precision,
        **more,
    }


def side_command(job: dict[str, Any]) -> list[str]:
    """Return the command that does a job."""
    return [sys.executable, str(Path(__file__).with_name("sides.py")), json.dumps(job)]


def run_side(side: str, args: argparse.Namespace, **more: Any) -> Run | None:
    """Run one side once, say how it went, and return None if it ended without a result.

    ``more`` goes into its job: for ours ``policy``, and ``replay``, a file of expert ids.
    """
    command = side_command(job_of(side, args, **more))
    env = {"OMP_NUM_THREADS": str(args.threads)}
    files = sorted(args.model.glob("*.safetensors"))
    drop_page_cache()
    with read_ahead(args.model, args.read_ahead if side == "llamacpp" else None):
        seen, disk = beside_disk(
            files[:-1] or files,  # the last one may be small
            min(EXPERT_BYTES, files[0].stat().st_size),
            lambda: run_confined(command, memory=args.limit, env=env, timeout=args.timeout),
        )
    if seen.report is None:
        print(f"{side}: ended with {seen.returncode} before a result\n{seen.stderr_tail}", flush=True)
        return None
    report = seen.report
    run = Run(seen, disk, report["load_seconds"], report["prefill"], report["decode"])
    print(describe(f"{side} {more.get('policy') or ''}".strip(), run), flush=True)
    if report["stats"]:
        print(f"  {report['stats']}", flush=True)
    return run


def describe(side: str, run: Run) -> str:
    """One line for people."""
    prefill = ", ".join(
        f"{length} tokens {run.prefill_speed(length):.1f}/s ({run.prefill_rate(length) / 1e9:.2f} GB/s)"
        for length in run.prefill
    )
    return (
        f"{side}: decode {run.decode_speed:.2f} tokens/s, {format_size(run.decode_bytes)} a token, "
        f"{run.decode_rate / 1e9:.2f} GB/s, disk {run.disk.best / 1e9:.2f} GB/s; prefill {prefill}; "
        f"peak {format_size(run.seen.peak_resident_bytes)} "
        f"(group {format_size(run.seen.peak_group_bytes or 0)}); load {run.load_seconds:.0f} s"
    )


def most_shown(runs: Iterable[Run]) -> float:
    """Bytes/s that the disk showed anywhere in this measurement, also while a side was at work.

    A shared disk is faster in one minute than in the next: what a side has read in is a lower limit as well.
    """
    return max(
        rate
        for run in runs
        for rate in (run.disk.best, run.decode_rate, *(run.prefill_rate(length) for length in run.prefill))
    )


def rows_of(runs: dict[str, list[Run]], name: str, disk: float) -> list[Row]:
    """Compare ours with each peer; a side alone if nothing else ran. ``disk``: the most it showed."""
    ours = runs.get("ours", [])
    peers = {side: theirs for side, theirs in runs.items() if side != "ours" and theirs}
    if not peers:
        return compare_sides(ours, None, [], name, disk)
    return [row for side, theirs in peers.items() for row in compare_sides(ours, side, theirs, name, disk)]


def compare_sides(ours: list[Run], side: str | None, theirs: list[Run], name: str, disk: float) -> list[Row]:
    """Return every row of ours beside one peer."""

    def row(
        what: str, metric: str, value: Callable[[Run], float], higher: bool, shares: Sequence[float] = ()
    ) -> Row:
        return compare(
            f"{name}, {what}",
            metric,
            [value(run) for run in ours],
            PEER_NAMES[side] if side else None,
            [value(run) for run in theirs],
            higher_is_better=higher,
            bound_shares=shares,
        )

    rows = [
        row(
            "decode", "tokens/s", lambda run: run.decode_speed, True, [run.decode_rate / disk for run in ours]
        ),
        row("whole life", "peak resident bytes", lambda run: run.seen.peak_resident_bytes, False),
        row("load", "seconds", lambda run: run.load_seconds, False),
    ]
    if all(run.decode_bytes for run in ours):  # no ratio to a side that found everything in memory
        rows.append(row("decode", "bytes read per token", lambda run: run.decode_bytes, False))
    for length in (ours or theirs)[0].prefill:
        shares = [run.prefill_rate(length) / disk for run in ours]
        rows.append(
            row(f"prefill {length}", "tokens/s", lambda run, n=length: run.prefill_speed(n), True, shares)
        )
    return rows


def prepare(args: argparse.Namespace) -> None:
    """Make the checkpoint and the GGUF if they are missing."""
    from gangline.benchmarks.shapes import make_shape
    from gangline.checkpoint.gguf_writer import write_gguf

    if not args.model.is_dir():
        make_shape(SPEC, args.model, progress=lambda done, total: print(f"{done / total:.0%} written"))
    if "llamacpp" in args.sides and not args.gguf.exists():
        print(f"writing {args.gguf}")
        write_gguf(args.model, args.gguf)
    args.offload_folder.mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Run all rounds and write the result."""
    args = parse_args()
    prepare(args)
    runs: dict[str, list[Run]] = {side: [] for side in args.sides}
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", flush=True)
        for side in args.sides:
            run = run_side(side, args)
            if run is not None:
                runs[side].append(run)
    if not any(runs.values()):
        sys.exit("no side came to a result")
    disk = most_shown(run for done in runs.values() for run in done)
    rows = rows_of(runs, f"{SPEC} bf16, {format_size(args.memory)}", disk)
    if args.out is not None:
        machine = {
            "threads": args.threads,
            "disk_bytes_per_s": disk,
            "disk_read_bytes": EXPERT_BYTES,
            "peer_read_ahead_kib": args.read_ahead,
        }
        places = {
            "--model": "FOLDER",
            "--gguf": "FILE.gguf",
            "--offload-folder": "FOLDER",
            "--out": "FILE.json",
        }
        command = running_command(places)
        print(write_result(args.out.stem, rows, command, folder=args.out.parent, machine=machine))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the checkpoint; made if missing")
    add("--gguf", type=Path, help="its bf16 GGUF; made if missing (default: beside the folder)")
    add("--only", dest="sides", action="append", choices=SIDES, help="run this side only (repeatable)")
    add("--memory", type=parse_size, default=parse_size("6GiB"), help="our budget")
    add("--limit", type=parse_size, help="limit of the control group of every side (default: --memory)")
    add("--rounds", type=int, default=1)
    add("--prompts", type=int, nargs="+", default=[64, 512], help="prompt lengths in tokens")
    add("--decode", type=int, default=16, help="tokens decoded after each prompt")
    add("--decode-slow", type=int, default=2, help="the same for transformers' disk offload")
    add("--read-ahead", type=int, default=128, help="KiB of read-ahead for llama.cpp")
    add("--offload-cpu", default="4GB", help="max_memory of the CPU for transformers")
    add("--offload-folder", type=Path, help="where transformers puts offloaded weights")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=1800, help="seconds for one run")
    add("--out", type=Path, help="result file, for example benchmarks/results/offload_vs_peers.json")
    args = parser.parse_args()
    args.precision = "stored"
    args.sides = args.sides or list(SIDES)
    args.limit = args.limit or args.memory
    args.gguf = args.gguf or args.model.with_name(f"{args.model.name}-bf16.gguf")
    args.offload_folder = args.offload_folder or args.model.with_name(f"{args.model.name}-offload")
    return args


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    main()
