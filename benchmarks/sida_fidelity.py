"""The fidelity part of ``sida.py``: a hash function for the demo, judged on files that it has not seen."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from gangline.benchmarks.result import Row, compare
from gangline.evaluation.execute_fidelity import execution_fidelity
from gangline.evaluation.plain import find_checkpoint, load_tokenizer
from gangline.evaluation.predictor_data import RoutedText, recorded, routed_texts, texts_within
from gangline.evaluation.predictor_hits import baselines, measure_hits, network_scorer
from gangline.evaluation.predictor_training import TrainingSettings, train_predictor

# What the paper states: top-3 hash hits on SST2 in %, and perplexity on C4 before and after, by experts.
PAPER_HITS = {8: 99.00, 128: 98.78}
PAPER_PERPLEXITY = {8: (6.68, 18.49), 64: (4.93, 11.84), 128: (4.86, 11.73)}


def fidelity_rows(
    model: Any, train: list[Path], held_out: list[Path], tokens: tuple[int, int], epochs: int
) -> list[Row]:
    """Train on real text of the demo and say what hints hit and what executing them costs."""
    tokenizer = load_tokenizer(find_checkpoint("demo"))
    learn = _documents(model, tokenizer, train, tokens[0])
    test = _documents(model, tokenizer, held_out, tokens[1])
    started = time.perf_counter()
    with torch.enable_grad():
        trained = train_predictor("sida", model, learn, TrainingSettings(epochs=epochs), _say_step)
    seconds = time.perf_counter() - started
    experts = trained.config["experts"]
    scorers = {"SiDA": network_scorer("sida", trained.network, model)} | baselines(learn, experts)
    hits = {one.name: one for one in measure_hits(scorers, test)}
    seen = measure_hits({"SiDA": scorers["SiDA"]}, learn[: len(test)])[0]
    fidelity = execution_fidelity(model, trained.network, test)
    work = f"demo, {sum(len(d.ids_T) for d in learn)} tokens learnt, other files held out"
    rows = [Row(work, "training, s", seconds)]
    for metric, label in (("top1", "top-1"), ("topk", "top-3"), ("recall", "recall of both experts")):
        text = f"{label} hash hits, %" if metric != "recall" else f"{label}, %"
        mine = 100 * hits["SiDA"].mean(metric)
        for name in ("frequency", "token-id", "previous token"):
            theirs = 100 * hits[name].mean(metric)
            rows.append(Row(work, text, mine, f"{name} baseline", theirs, mine / theirs))
        rows.append(Row(work, f"{text}, on the text learnt from", 100 * seen.mean(metric)))
    for experts_paper in (8, 128):
        rows.append(
            Row(
                work,
                "top-3 hash hits, %",
                100 * hits["SiDA"].mean("topk"),
                f"paper, base-{experts_paper} fine-tuned, SST2",
                PAPER_HITS[experts_paper],
            )
        )
    rows.append(
        compare(
            work,
            "perplexity of executing the table",
            [fidelity.perplexity],
            "exact",
            [fidelity.exact_perplexity],
            higher_is_better=False,
        )
    )
    cost = fidelity.perplexity / fidelity.exact_perplexity
    for number, (exact, ours) in PAPER_PERPLEXITY.items():
        rows.append(Row(work, "perplexity, times the exact", cost, f"paper, base-{number}, C4", ours / exact))
    rows.append(Row(work, "same likeliest next token, %", 100 * fidelity.same_next_token))
    rows.append(Row(work, "experts of the exact model executed, %", 100 * fidelity.recall))
    for row in rows:
        beside = "" if row.peer is None else f", {row.peer} {row.peer_value:.4g}"
        print(f"{row.work}: {row.metric} {row.ours:.4g}{beside}", flush=True)
    return rows


def _documents(model: Any, tokenizer: Any, files: list[Path], tokens: int) -> list[RoutedText]:
    items = texts_within(files, tokenizer, window=256, tokens=tokens)
    with recorded(
        model, "demo", items, extras=("logits",), tokenizer=tokenizer, on_item=_say_tokens
    ) as trace:
        return routed_texts(trace)


def _say_tokens(done: int, total: int) -> None:
    sys.stderr.write(f"\rrecording {done} of {total} tokens" + ("\n" if done == total else ""))


def _say_step(step: int, steps: int, loss: float) -> None:
    sys.stderr.write(f"\rtraining, step {step} of {steps}, loss {loss:.4f}" + ("\n" if step == steps else ""))
