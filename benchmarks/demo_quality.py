"""Perplexity of the demo model on text it never saw, beside the dense model, over widths and baselines.

    python benchmarks/demo_quality.py --json --work demo-text

Rows: the shipped demo model as plain transformers runs it; a curve of closed-form conversions (no
distillation, less text) over the share of active neurons; and two baselines at the demo's width: neurons
drawn at random for every expert, and one static set of neurons for all tokens. The peer of every row is
the dense model in the same run. Needs apt-get for the text that scripts/demo_text.py names.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gangline.benchmarks.result import Row, compare, write_result
from gangline.compress.demo import ensure_demo
from gangline.compress.demo_source import find_gguf
from gangline.compress.dense_to_moe import FitConfig, LayerPlan, fit_layers, load_dense
from gangline.compress.dense_to_moe.source import dense_ffn

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import demo_text
from make_demo_artifact import training_rows

WINDOW = 512
PEER = "dense SmolLM2-135M-Instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Explain gravity to a child.",
    "Write a short poem about the sea.",
    "Give me three tips for sleeping better.",
    "How do I write a for loop in Python?",
)


def perplexity(model: Any, ids_SC: torch.Tensor) -> float:
    """Of windows [S, C], the first token of each given."""
    losses = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for ids_C in ids_SC:
            logits_CV = model(ids_C[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits_CV, ids_C[1:]))
    return float(torch.stack(losses).mean().exp())


def spread_windows(ids_T: torch.Tensor, count: int) -> torch.Tensor:
    """`count` windows spread evenly over a text."""
    total = len(ids_T) // WINDOW
    starts = [i * total // count * WINDOW for i in range(count)]
    return torch.stack([ids_T[start : start + WINDOW] for start in starts])


@contextmanager
def planned(model: Any, plans: list[LayerPlan]) -> Iterator[None]:
    """Inside the block every FFN of the dense model gives what its plan's experts would."""

    def grouped(plan: LayerPlan, layer: Any) -> Callable[..., torch.Tensor]:
        ffn = dense_ffn(layer)
        return lambda _, inputs, __: plan.output(ffn, inputs[0].flatten(0, 1)).view_as(inputs[0])

    hooks = [
        layer.mlp.register_forward_hook(grouped(plan, layer))
        for layer, plan in zip(model.model.layers, plans, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def random_neurons(plan: LayerPlan, neurons: int) -> LayerPlan:
    """The same router over neurons drawn at random, nothing refitted."""
    groups, width = plan.neurons_GW.shape
    drawn_GW = torch.stack([torch.randperm(neurons)[:width].sort().values for _ in range(groups)])
    return LayerPlan(plan.router_GD, drawn_GW)


def sample_answers(model: Any, tokenizer: Any) -> dict[str, str]:
    """Greedy answers."""
    answers = {}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        answers[question] = tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return answers


class Measure:
    """Perplexities on held-out windows beside those of the dense model, taken once."""

    def __init__(self, dense: Any, texts: dict[str, torch.Tensor]) -> None:
        self.texts = texts
        self.dense = {name: perplexity(dense, ids_SC) for name, ids_SC in texts.items()}

    def __call__(self, work: str, model: Any) -> list[Row]:
        """One row per text."""
        rows = []
        for name, ids_SC in self.texts.items():
            ours, peer = perplexity(model, ids_SC), self.dense[name]
            where = f"{work}, {name} ({ids_SC.numel()} tokens)"
            print(f"{where}: {ours:.2f}, dense {peer:.2f}, {ours / peer:.3f}x", flush=True)
            rows.append(compare(where, "perplexity", [ours], PEER, [peer], higher_is_better=False))
        return rows


def curve(dense: Any, measure: Measure, ids_SC: torch.Tensor, widths: list[int]) -> list[Row]:
    """Closed-form conversions of several widths, and the two baselines."""
    rows: list[Row] = []
    neurons = dense.config.intermediate_size
    base = FitConfig(groups=8, group_width=1152, shared_rank=48, own_rank=28)
    note = f"fitted on {ids_SC.numel()} tokens"
    for width in widths:
        ranks = {"shared_rank": 0, "own_rank": 0} if 2 * width == neurons else {}
        config = replace(base, group_width=2 * width, **ranks)
        plans = list(fit_layers(dense, ids_SC, config, dtype=torch.bfloat16))
        share = f"{200 * width / neurons:.4g}% active"
        with planned(dense, plans):
            rows += measure(f"conversion without distillation, {note}, {share}", dense)
        if width == 576:
            with planned(dense, [random_neurons(plan, neurons) for plan in plans]):
                rows += measure(f"baseline: random neurons per expert, {share}", dense)
    config = replace(base, groups=1, shared_rank=0, own_rank=0)
    with planned(dense, list(fit_layers(dense, ids_SC, config, dtype=torch.bfloat16))):
        rows += measure("baseline: the same neurons for all tokens, 75% active", dense)
    return rows


def main() -> None:
    """Measure, print, and with --json store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for downloaded text, kept between runs"
    )
    per_text = f"windows of {WINDOW} tokens per held-out text"
    parser.add_argument("--windows", type=int, default=24, help=f"{per_text}, for the demo model")
    parser.add_argument("--curve-windows", type=int, default=8, help=f"{per_text}, for curve and baselines")
    parser.add_argument(
        "--fit-tokens", type=int, default=8192, help="text that the curve's conversions fit on"
    )
    parser.add_argument("--widths", type=int, nargs="*", default=[576, 384, 480, 768])
    parser.add_argument("--samples", action="store_true", help="also print greedy answers of both models")
    parser.add_argument("--json", action="store_true", help="store benchmarks/results/demo_quality.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    dense, tokenizer = load_dense(find_gguf())
    held_out = {
        name: demo_text.source_ids(name, tokenizer, dense, args.work) for name in demo_text.HELD_OUT_PACKAGES
    }
    demo = AutoModelForCausalLM.from_pretrained(ensure_demo(), dtype=torch.bfloat16)
    rows: list[Row] = []
    measure = Measure(dense, {name: spread_windows(ids_T, args.windows) for name, ids_T in held_out.items()})
    rows += measure("demo as shipped, top-2 of 16, 75% of the FFN active", demo)
    if args.samples:
        print(
            json.dumps(
                {"demo": sample_answers(demo, tokenizer), "dense": sample_answers(dense, tokenizer)}, indent=1
            )
        )
    measure = Measure(
        dense, {name: spread_windows(ids_T, args.curve_windows) for name, ids_T in held_out.items()}
    )
    ids_SC = training_rows(tokenizer, dense, args.work, args.fit_tokens)
    rows += curve(dense, measure, ids_SC, args.widths)
    if args.json:
        print(write_result("demo_quality", rows))
    else:
        print(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
