"""What gangline plan says beside what then happens: size, peak resident memory, tokens/s.

    python benchmarks/plan_vs_reality.py demo=100MiB@1024 FOLDER=6GiB@600 OTHER=4GiB@600 \
        --rounds 3 --out benchmarks/results/plan_vs_reality.json

Each case is MODEL=MEMORY@CONTEXT: a folder, the word demo, or a shape such as qwen3-30b-a3b:4, which is made
in the cache folder if it is missing (its size is stated first). Each round runs in a fresh process; its peak
resident memory is measured from outside. --limit also holds it to the budget by a control group, which counts
the page cache of every file it touches, libraries included, and so is stricter than the promise.
"""

import argparse
import json
import logging
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.benchmarks.confine import Confined, drop_page_cache, run_confined
from gangline.benchmarks.result import Row, write_result
from gangline.benchmarks.shapes import SHAPES, make_shape
from gangline.core.sizes import format_size, parse_size
from gangline.runtime.machine import load_profile
from gangline.runtime.measure import measure_machine


@dataclass(frozen=True)
class Case:
    """One model under one budget; ``name`` is what the result calls it."""

    name: str
    folder: Path
    memory: int
    context: int


def read_case(text: str) -> Case:
    """Read MODEL=MEMORY@CONTEXT and make the model if it is missing."""
    model, _, rest = text.partition("=")
    memory, _, context = rest.partition("@")
    if model == "demo":
        from gangline.compress.demo import ensure_demo

        folder = Path(ensure_demo())
    elif model.partition(":")[0] in SHAPES:
        folder = make_shape(model)
    else:
        folder = Path(model)
    return Case(folder.name if folder == Path(model) else model, folder, parse_size(memory), int(context))


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint, from the headers of its files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(
            tensor["data_offsets"][1] - tensor["data_offsets"][0]
            for name, tensor in header.items()
            if name != "__metadata__"
        )
    return total


def child(job: dict[str, Any], case: Case, args: argparse.Namespace) -> Confined:
    """Run ``sides.py`` on a job, or end with its last words."""
    job |= {"model": str(case.folder), "memory": case.memory, "context": case.context}
    command = [sys.executable, str(Path(__file__).with_name("sides.py")), json.dumps(job)]
    limit = case.memory if args.limit else None
    env = {"OMP_NUM_THREADS": str(args.threads)}
    seen = run_confined(command, memory=limit, env=env, timeout=args.timeout)
    if seen.report is None:
        sys.exit(f"{case.name}: ended with {seen.returncode} before a result\n{seen.stderr_tail}")
    return seen


def run_once(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Load, read a prompt and decode under the budget; return what was measured."""
    drop_page_cache()
    job = {
        "side": "ours",
        "prompts": [min(args.prompt, case.context - args.decode)],
        "decode": args.decode,
        "seed": args.seed,
        "vocab": json.loads((case.folder / "config.json").read_text())["vocab_size"],
        "threads": args.threads,
    }
    seen = child(job, case, args)
    report = seen.report or {}
    (length, prefill), *_ = report["prefill"].items()
    return {
        "peak": seen.peak_resident_bytes,
        "decode": len(report["decode"]) / sum(step["seconds"] for step in report["decode"]),
        "prefill": int(length) / prefill["seconds"],
        "hit_rate": report["stats"].get("hit_rate"),
    }


def measure_case(case: Case, args: argparse.Namespace) -> list[Row]:
    """Return the rows of one case."""
    plan = child({"side": "plan"}, case, args).report or {}
    runs = []
    for _ in range(args.rounds):
        runs.append(run_once(case, args))
        print(f"{case.name}: {runs[-1]}; planned peak {plan['peak']}, {plan['speed']}", flush=True)
    name = f"{case.name}, {format_size(case.memory)}, context {case.context}"
    peak = max(run["peak"] for run in runs)
    size = plan["dense"] + plan["expert_bytes"]
    rows = [
        Row(f"{name}, size", "bytes", size, "measured", stored_bytes(case.folder)),
        Row(
            f"{name}, peak resident",
            "bytes",
            plan["peak"],
            "measured",
            peak,
            plan["peak"] / peak,
            n=len(runs),
        ),
    ]
    for phase in ("decode", "prefill"):
        speeds = [run[phase] for run in runs]
        median = statistics.median(speeds)
        spread = max(speeds) - min(speeds) if len(speeds) > 1 else None
        for end, value in zip(("low", "high"), plan["speed"][f"{phase}_tokens_per_second"], strict=True):
            peer = f"{end} end of the planned band"
            work = f"{name}, {phase}"
            rows.append(
                Row(work, "tokens/s", median, peer, value, median / value, n=len(runs), spread=spread)
            )
    return rows


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="+", metavar="MODEL=MEMORY@CONTEXT")
    add("--rounds", type=int, default=1)
    add("--prompt", type=int, default=512, help="prompt length in tokens")
    add("--decode", type=int, default=16, help="tokens decoded after the prompt")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=1800, help="seconds for one run")
    add("--limit", action="store_true", help="hold each run to its budget by a control group (root)")
    add("--out", type=Path, help="result file, for example benchmarks/results/plan_vs_reality.json")
    args = parser.parse_args()
    if load_profile() is None:
        measure_machine(progress=print)
    cases = [read_case(text) for text in args.cases]
    rows = [row for case in cases for row in measure_case(case, args)]
    if args.out is not None:
        shown = " ".join(
            f"{case.name}={format_size(case.memory).replace(' ', '')}@{case.context}" for case in cases
        )
        command = (
            f"python benchmarks/plan_vs_reality.py {shown} --rounds {args.rounds} --prompt {args.prompt} "
            f"--decode {args.decode} --threads {args.threads}{' --limit' * args.limit}"
        )
        print(write_result(args.out.stem, rows, command, folder=args.out.parent))


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    main()
