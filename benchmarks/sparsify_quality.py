"""Perplexity of the demo model with pruned experts, by pattern and method, on text that nobody looked at.

    python benchmarks/sparsify_quality.py --work demo-text --json

A recipe is a method and what follows it: sparsegpt, sparsegpt+reconstruct=2, alps+distill=65536. With
text=SHARE what learns adapts to text of the kind that is held out too, which the unpruned demo did not.
The peer of every row is the unpruned demo in the same run, so a ratio below 1 is a loss. Needs apt-get for
the texts that scripts/demo_text.py names: those of training calibrate, those held out judge. Learning
(distill=) that was interrupted goes on where it was, from the folder --work.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import cast

import torch

from gangline.benchmarks.result import Row, compare, read_result, running_command, write_result
from gangline.compress.demo import ensure_demo
from gangline.compress.demo_source import find_gguf
from gangline.compress.dense_to_moe import load_dense
from gangline.compress.sparsify import METHODS, Method, SparsifySettings
from gangline.evaluation.sparsification import SparsifyReport, SparsifyTexts, sparsify_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import demo_text

PEER = "unpruned demo"
NAME = "sparsify_quality"
TEXT_TOKENS = 750_000
"""Of these the calibration tokens and those that are learned from are taken, evenly spread."""
RECIPES = (*METHODS, "sparsegpt+damping=0.1+reconstruct=2")


def mixed_text(names: list[str], tokens: int, work: Path) -> str:
    """As many tokens of each of some texts, from their middle, as add up to ``tokens``."""
    dense, tokenizer = load_dense(find_gguf())
    parts = []
    for name in names:
        ids_T = demo_text.source_ids(name, tokenizer, dense, work)
        count = min(len(ids_T), tokens // len(names))
        start = (len(ids_T) - count) // 2
        parts.append(str(tokenizer.decode(ids_T[start : start + count])))
    return "\n\n".join(parts)


def settings_of(recipe: str, pattern: str, values: str, permute: bool) -> SparsifySettings:
    """The settings that a recipe stands for."""
    method, *more = recipe.split("+")
    options = {"reconstruct": "0", "distill": "0", "text": "0", "damping": "0.01"}
    for option in more:
        name, _, value = option.partition("=")
        if name not in options:
            raise SystemExit(f"{recipe}: {name} is none of {', '.join(options)}")
        options[name] = value
    return SparsifySettings(
        pattern,
        cast(Method, method),
        values,
        permute=permute,
        reconstruct=int(options["reconstruct"]),
        distill_tokens=int(options["distill"]),
        distill_text=float(options["text"]),
        damping=float(options["damping"]),
    )


def rows_of(report: SparsifyReport, recipe: str) -> list[Row]:
    """Perplexity, kept energy and true bits of one run."""
    settings, tokens = report.settings, report.calibration_tokens
    work = f"demo, {settings.pattern}, {recipe}, {settings.precision}, {tokens} calibration tokens"
    before, after = report.perplexity_before, report.perplexity_after
    assert before is not None
    assert after is not None
    return [
        compare(
            f"{work}, {report.held_out_tokens} tokens",
            "perplexity",
            [after],
            PEER,
            [before],
            higher_is_better=False,
        ),
        compare(work, "kept share of squared weights", [report.kept]),
        compare(
            work,
            "bits per expert weight",
            [report.bits_per_weight],
            PEER,
            [report.stored_bits_per_weight],
            higher_is_better=False,
        ),
    ]


def stored() -> tuple[list[Row], list[str]]:
    """The rows of the stored result and the commands that measured them; none if there is no such file."""
    path = Path("benchmarks/results") / f"{NAME}.json"
    if not path.is_file():
        return [], []
    result = read_result(path)
    return [Row(**row) for row in result["rows"]], result["command"].split("; ")


def store(kept: list[Row], rows: list[Row], command: str) -> None:
    """Write the rows that were measured, and those kept of which nothing was measured anew."""
    fresh = {(row.work, row.metric) for row in rows}
    others = [row for row in kept if (row.work, row.metric) not in fresh]
    print(write_result(NAME, [*others, *rows], command))


def tell(what: str, done: int, total: int) -> None:
    """Say now and then how far it is."""
    if done % 5 == 0 or what.startswith("distilling"):
        print(f"{datetime.now():%H:%M:%S} {what} {done}/{total}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and with --json store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for texts, kept between runs")
    parser.add_argument("--patterns", nargs="*", default=["2:4", "3:4:32", "1:2:32"])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--values", nargs="*", default=["bf16"], help="bf16, int8, int4, ...")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--permute", action="store_true", help="reorder intermediate channels")
    parser.add_argument("--add", action="store_true", help="keep the other rows of the stored result")
    parser.add_argument("--json", action="store_true", help="store benchmarks/results/sparsify_quality.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    calibration = mixed_text(list(demo_text.TRAIN_PACKAGES), TEXT_TOKENS, args.work)
    judged = mixed_text(list(demo_text.HELD_OUT_PACKAGES), args.held_out_tokens, args.work)
    texts = SparsifyTexts(calibration, judged, args.tokens, args.held_out_tokens)
    rows: list[Row] = []
    kept, earlier = stored() if args.add else ([], [])
    commands = "; ".join([*earlier, running_command({"--work": "demo-text"})])
    for pattern in args.patterns:
        for recipe in args.recipes:
            for values in args.values:
                settings = settings_of(recipe, pattern, values, args.permute)
                halfway = args.work / f"{pattern} {recipe} {values} {args.tokens}".replace(":", "-")
                with tempfile.TemporaryDirectory() as folder:
                    report = sparsify_checkpoint(
                        ensure_demo(),
                        Path(folder) / "sparse",
                        texts=texts,
                        settings=settings,
                        progress=tell,
                        resume=halfway if settings.distill_tokens else None,
                    )
                rows += rows_of(report, recipe)
                print(json.dumps([asdict(row) for row in rows[-3:]], indent=1), flush=True)
                if args.json:
                    store(kept, rows, commands)


if __name__ == "__main__":
    main()
