"""Decoding and reading prompts on the CPU: gangline beside llama.cpp and transformers, in turns.

    python benchmarks/native_vs_peers.py --folder shapes --out benchmarks/results/native_vs_peers.json
    python benchmarks/native_vs_peers.py --folder shapes --only olmoe-int4 --only batch

Makes the random checkpoints of the OLMoE-1B-7B and Qwen3-30B-A3B shapes and their GGUF files in --folder if
they are missing: the same weights on both sides. Every engine runs in a process of its own with the same
number of threads; in each round each one reads the same tokens, with the bandwidth of memory measured before
and after. Prompts are timed at --prompt tokens, decoding behind a short prompt, so that the weights and not
the key-value cache are what is read. ``half-memory`` needs Linux and root (a memory limit, and the page cache
emptied); ``first-token`` needs the demo. Needs: pip install "gangline[gguf]" llama-cpp-python
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import offload_vs_peers

from gangline.benchmarks.result import Row, running_command, write_result
from gangline.benchmarks.shapes import make_shape
from gangline.checkpoint.gguf_writer import GGUFType, write_gguf
from gangline.core.sizes import format_size
from gangline.evaluation.compare_speed import compare_with
from gangline.evaluation.compare_speed_peers import find_peer
from gangline.evaluation.speed import SpeedSettings
from gangline.evaluation.speed_report import SpeedReport, Spread

TYPES: dict[str, GGUFType] = {"int4": "q4_0", "int8": "q8_0", "stored": "bf16"}
BITS = {"int4": "int4", "int8": "int8", "stored": "bf16"}
DECODE_PROMPT = 16


@dataclass(frozen=True)
class Case:
    """One comparison with everything in memory.

    Attributes:
        shape: ``olmoe`` or ``qwen3``: which of the two checkpoints.
        precision: of ours; llama.cpp gets the file type of as many bits.
        peer: the engine.
        batched: decode --batch sequences at once, and nothing else.
        same_file: ours loads the very GGUF file of llama.cpp. Its head is Q8_0, not Q6_K, for both.
    """

    shape: str
    precision: str
    peer: str = "llama.cpp"
    batched: bool = False
    same_file: bool = False


CASES = {
    "olmoe-int4": Case("olmoe", "int4"),
    "olmoe-int8": Case("olmoe", "int8"),
    "olmoe-bf16": Case("olmoe", "stored"),
    "olmoe-gguf": Case("olmoe", "int4", same_file=True),
    "qwen3-int4": Case("qwen3", "int4"),
    "qwen3-int8": Case("qwen3", "int8"),
    "qwen3-bf16": Case("qwen3", "stored"),
    "batch": Case("olmoe", "int4", batched=True),
    "olmoe-transformers": Case("olmoe", "int4", "transformers"),
    "qwen3-transformers": Case("qwen3", "int4", "transformers"),
}
OTHERS = ("half-memory", "first-token")


def run_case(case: Case, args: argparse.Namespace) -> list[Row]:
    """Return the rows of one case: decoding, and reading a prompt."""
    spec = getattr(args, case.shape)
    folder = checkpoint(spec, args)
    gguf = None
    if case.peer == "llama.cpp":
        gguf = gguf_of(folder, TYPES[case.precision], args, head="q8_0" if case.same_file else None)
    ours = gguf if case.same_file and gguf else folder
    what = f"{spec} {'Q4_0 GGUF, the same file' if case.same_file else BITS[case.precision]}"
    decode = SpeedSettings(
        prompt_tokens=DECODE_PROMPT,
        new_tokens=args.new_tokens,
        repetitions=args.rounds,
        batch=args.batch if case.batched else 1,
        seed=args.seed,
    )
    prefill = SpeedSettings(prompt_tokens=args.prompt, new_tokens=2, repetitions=args.rounds, seed=args.seed)
    rows: list[Row] = []
    for settings in (decode,) if case.batched else (decode, prefill):
        peer = find_peer(
            case.peer,  # type: ignore[arg-type]
            folder,
            settings,
            threads=args.threads,
            progress=say,
            gguf=gguf,
            experts=args.transformers_experts if case.peer == "transformers" else None,
        )
        report = compare_with(
            ours,
            [peer],
            settings,
            name=what,
            progress=say,
            together=False if args.in_turns else None,
            threads=args.threads,
            precision="stored" if case.same_file else case.precision,
            ctx_size=settings.context,
        )
        if settings is decode:
            rows += decode_rows(what, report)
        else:
            rows.append(prefill_row(what, report, args.prompt))
    for row in rows:
        print(describe(row), flush=True)
    return rows


def decode_rows(what: str, report: SpeedReport) -> list[Row]:
    """Tokens/s beside the peer, and the shares of the memory bandwidth of both."""
    (peer,) = report.peers
    work = f"{what}, decode" + (f", {report.batch} sequences" if report.batch > 1 else "")
    name = f"{peer.name} {peer.weights}"
    rows = [row(work, "tokens/s", report.decode, name, peer.decode, peer.decode_ratio, report.bound.share)]
    if peer.decode_share is not None:
        shares = report.bound.shares
        ratio = Spread.of([shares.median / peer.decode_share.median])
        rows.append(row(work, "share of memory bandwidth", shares, name, peer.decode_share, ratio))
    bandwidth = Spread.of([report.bound.memory_bandwidth / 1e9])
    rows.append(row(work, "GB/s, most that memory showed beside", bandwidth))
    return rows


def prefill_row(what: str, report: SpeedReport, tokens: int) -> Row:
    """Tokens/s of the prompt beside the peer."""
    (peer,) = report.peers
    name = f"{peer.name} {peer.weights}"
    work = f"{what}, prefill {tokens}"
    return row(work, "tokens/s", report.prefill, name, peer.prefill, peer.prefill_ratio)


def row(
    work: str,
    metric: str,
    ours: Spread,
    peer: str | None = None,
    theirs: Spread | None = None,
    ratio: Spread | None = None,
    share: float | None = None,
) -> Row:
    """A row of medians; the ratio is the median of the rounds' own ratios."""
    return Row(
        work,
        metric,
        ours.median,
        peer,
        theirs.median if theirs else None,
        ratio.median if ratio else None,
        share,
        ours.n,
        ours.high - ours.low if ours.n > 1 else None,
    )


def half_memory(args: argparse.Namespace) -> list[Row]:
    """Decoding in half the bytes of the Q4_0 file, everything counted, llama.cpp paging by mmap."""
    folder = checkpoint(args.olmoe, args)
    gguf = gguf_of(folder, "q4_0", args)
    memory = args.memory or gguf.stat().st_size // 2
    settings = offload_vs_peers.settings_in(memory, folder, gguf, DECODE_PROMPT, args)
    runs: dict[str, list[offload_vs_peers.Run]] = {"ours": [], "llamacpp": []}
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        for side, done in runs.items():
            run = offload_vs_peers.run_side(side, settings)
            if run is None:
                raise SystemExit(f"half-memory: {side} did not come to an end in {format_size(memory)}")
            done.append(run)
    disk = offload_vs_peers.most_shown(run for done in runs.values() for run in done)
    name = f"{args.olmoe} int4 in {format_size(memory)}"
    return offload_vs_peers.compare_sides(runs["ours"], "llamacpp", runs["llamacpp"], name, disk)


def first_token(args: argparse.Namespace) -> list[Row]:
    """Seconds from the start of ``gangline run demo`` to its first byte, and what of them is not imports.

    The command imports the libraries otherwise than plainly, and reads experts meanwhile. So what it does not
    spend on them is measured in runs of the command itself that say how long they imported.
    """
    asked = ["run", "demo", "The capital of France is", "-n", "1", "--threads", str(args.threads)]
    ours = [sys.executable, "-m", "gangline", *asked]
    timed = [sys.executable, "-c", SAYS_IMPORT_SECONDS, *asked]
    imports = "import torch, transformers.models.mixtral.modeling_mixtral, transformers.generation as g"
    bare = [sys.executable, "-c", f"{imports}; g.GenerationMixin; print(1)"]
    for _ in range(2):  # makes the demo if it is missing, warms the page cache, and knows what to read early
        seconds_to_first_byte(ours)
    whole, libraries, own = [], [], []
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        whole.append(seconds_to_first_byte(ours)[0])
        libraries.append(seconds_to_first_byte(bare)[0])
        seconds, said = seconds_to_first_byte(timed)
        own.append(seconds - float(said))
    work = "demo, warm cache, first token"
    beyond = [a - b for a, b in zip(whole, libraries, strict=True)]
    return [
        row(
            work, "seconds", Spread.of(whole), "importing torch and transformers alone", Spread.of(libraries)
        ),
        row(work, "seconds beyond these imports", Spread.of(beyond)),
        row(work, "seconds besides its own, quicker import of them", Spread.of(own)),
    ]


SAYS_IMPORT_SECONDS = """
import sys, time
from gangline.cli import startup
real = startup.import_torch_and_transformers
def timed(meanwhile):
    begin = time.perf_counter()
    real(meanwhile)
    print(time.perf_counter() - begin, file=sys.stderr, flush=True)
startup.import_torch_and_transformers = timed
from gangline.cli.main import app
app()
"""


def seconds_to_first_byte(command: Sequence[str]) -> tuple[float, str]:
    """Start a command and wait for its first output; return the first line of its stderr, too."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.readline().decode()
        process.stderr.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command[1:])} ended with exit status {process.returncode}")
    return seconds, said


def checkpoint(spec: str, args: argparse.Namespace) -> Path:
    """Return the random checkpoint of a shape, made if it is missing."""
    return make_shape(spec, args.folder / spec.replace(":", "-"))


def gguf_of(folder: Path, type: GGUFType, args: argparse.Namespace, head: GGUFType | None = None) -> Path:
    """Return the GGUF file of a checkpoint, written if it is missing."""
    path: Path = args.folder / f"{folder.name}-{type}{f'-head-{head}' if head else ''}.gguf"
    if not path.exists():
        say(f"writing {path}")
        write_gguf(folder, path, type=type, head=head)
    return path


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def describe(row: Row) -> str:
    """One line for people."""
    peer = "" if row.peer is None else f", {row.peer} {row.peer_value:.4g}"
    ratio = "" if row.ratio is None else f", {row.ratio:.2f}x"
    share = "" if row.bound_share is None else f", {row.bound_share:.0%} of the bound"
    return f"{row.work}: {row.ours:.4g} {row.metric}{peer}{ratio}{share} (spread {row.spread or 0:.3g})"


def main() -> None:
    """Run the cases and write the result."""
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    others: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
        "half-memory": half_memory,
        "first-token": first_token,
    }
    rows: list[Row] = []
    for name in args.only or [*CASES, *OTHERS]:
        say(f"== {name}")
        if name in CASES:
            rows += run_case(CASES[name], args)
        else:
            found = others[name](args)
            rows += found
            print("\n".join(describe(item) for item in found if item.ours is not None), flush=True)
    if args.out is not None:
        machine: dict[str, Any] = {"threads": args.threads, "peer_read_ahead_kib": args.read_ahead}
        beside = [item.ours for item in rows if item.metric.startswith("GB/s") and item.ours is not None]
        if beside:
            machine["memory_bytes_per_s"] = statistics.median(beside) * 1e9
        command = running_command({"--folder": "FOLDER", "--out": "FILE.json"})
        print(write_result(args.out.stem, rows, command, folder=args.out.parent, machine=machine))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where checkpoints and GGUF files lie, or are made")
    add("--only", action="append", choices=[*CASES, *OTHERS], help="run this case only (repeatable)")
    add("--rounds", type=int, default=5)
    add("--olmoe", default="olmoe-1b-7b", help="shape; cut it for a try, for example olmoe-1b-7b:2")
    add("--qwen3", default="qwen3-30b-a3b:8", help="shape")
    add("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    add("--new-tokens", type=int, default=64, help="tokens decoded")
    add("--batch", type=int, default=8, help="sequences of the case 'batch'")
    add("--threads", type=int, default=2)
    add("--memory", type=int, help="bytes for half-memory (default: half the Q4_0 file)")
    add("--read-ahead", type=int, default=128, help="KiB of read-ahead for llama.cpp in half-memory")
    add("--transformers-experts", default="eager", help="its experts implementation")
    add("--in-turns", action="store_true", help="load one side at a time, also where all would fit")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="result file, for example benchmarks/results/native_vs_peers.json")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    main()
