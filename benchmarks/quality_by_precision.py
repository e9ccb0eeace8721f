r"""Perplexity of the demo at bf16, int8 and int4 beside llama.cpp's bf16, Q8_0 and Q4_0 of the same model.

    python benchmarks/quality_by_precision.py --work demo-text \
        --out benchmarks/results/quality_by_precision.json

Both engines read the same windows of the same held-out token ids (see scripts/demo_text.py); the first token
of each window is given. int8 and int4 are gangline's own rounding (to nearest, int4 with a search for the
clip), without calibration data. Needs: pip install "gangline[demo]" llama-cpp-python, and apt-get for text
that is not in --work yet.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import gangline
from gangline.benchmarks.result import Row, compare, running_command, write_result
from gangline.checkpoint.gguf_writer import GGUFType, write_gguf
from gangline.compress.demo import ensure_demo
from gangline.core.home import cache_dir
from gangline.evaluation.plain import find_checkpoint, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import demo_text

Logits = Callable[[Tensor], Tensor]  # ids [W] -> logits [W, V]


@dataclass(frozen=True)
class Level:
    """One precision of both engines."""

    name: str
    ours: str
    theirs: GGUFType


LEVELS = {
    "bf16": Level("bf16", "stored", "bf16"),
    "int8": Level("int8", "int8", "q8_0"),
    "int4": Level("int4", "int4", "q4_0"),
}


def perplexity(logits_of: Logits, ids_SW: Tensor) -> float:
    """Of windows [S, W], the first token of each given."""
    losses = [cross_entropy(logits_of(ids_W)[:-1].float(), ids_W[1:]) for ids_W in ids_SW]
    return math.exp(float(torch.stack(losses).mean()))


def spread_windows(ids_T: Tensor, count: int, window: int) -> Tensor:
    """`count` windows spread evenly over a text."""
    total = len(ids_T) // window
    starts = [i * total // count * window for i in range(count)]
    return torch.stack([ids_T[start : start + window] for start in starts])


@contextmanager
def ours(precision: str, threads: int) -> Iterator[Logits]:
    """Gangline on the demo."""
    model = gangline.load("demo", precision=precision, threads=threads)
    try:
        with torch.inference_mode():
            yield lambda ids_W: model(ids_W[None], use_cache=False).logits[0]
    finally:
        model.gangline.close()


@contextmanager
def llama_cpp(type: GGUFType, threads: int, window: int) -> Iterator[Logits]:
    """llama.cpp on the demo's GGUF file."""
    from llama_cpp import Llama

    path = cache_dir("gguf") / f"demo-{type}.gguf"
    write_gguf(ensure_demo(), path, type=type)
    llama = Llama(
        str(path),
        n_ctx=window,
        n_batch=window,
        n_ubatch=window,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )

    def logits_of(ids_W: Tensor) -> Tensor:
        llama.reset()
        llama.eval(ids_W.tolist())
        return torch.from_numpy(np.array(llama.scores[: len(ids_W)]))

    try:
        yield logits_of
    finally:
        llama.close()
        path.unlink()


def measure(level: Level, texts: dict[str, Tensor], threads: int, window: int) -> list[Row]:
    """One row per text."""
    with ours(level.ours, threads) as logits_of:
        mine = {name: perplexity(logits_of, ids_SW) for name, ids_SW in texts.items()}
    with llama_cpp(level.theirs, threads, window) as logits_of:
        theirs = {name: perplexity(logits_of, ids_SW) for name, ids_SW in texts.items()}
    peer = f"llama.cpp {level.theirs}"
    rows = []
    for name, ids_SW in texts.items():
        work = f"demo {level.name}, {name} ({ids_SW.numel()} tokens)"
        rows.append(compare(work, "perplexity", [mine[name]], peer, [theirs[name]], higher_is_better=False))
        print(f"{work}: {mine[name]:.3f}, {peer} {theirs[name]:.3f}", flush=True)
    return rows


def main() -> None:
    """Measure, print, and with --out store."""
    args = parse_args()
    tokenizer = load_tokenizer(find_checkpoint("demo"))
    texts = {
        name: spread_windows(
            demo_text.source_ids(name, tokenizer, None, args.work), args.windows, args.window
        )
        for name in demo_text.HELD_OUT_PACKAGES
    }
    rows: list[Row] = []
    for name in args.only or LEVELS:
        rows += measure(LEVELS[name], texts, args.threads, args.window)
    if args.out is not None:
        command = running_command({"--work": "FOLDER", "--out": "FILE.json"})
        print(write_result(args.out.stem, rows, command, folder=args.out.parent))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for downloaded text, kept between runs")
    add("--only", action="append", choices=list(LEVELS), help="measure this precision only (repeatable)")
    add("--windows", type=int, default=24, help="windows per held-out text")
    add("--window", type=int, default=512, help="tokens of a window")
    add("--threads", type=int, default=2)
    add("--out", type=Path, help="result file, for example benchmarks/results/quality_by_precision.json")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    main()
