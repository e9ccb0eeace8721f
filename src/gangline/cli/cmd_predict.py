"""``gangline predict``: learn from recorded routing, and say what that is worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gangline.cli.command import command
from gangline.cli.options import BudgetOptions, ComputeOptions, ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError

if TYPE_CHECKING:
    from gangline.cli.loading import Loaded
    from gangline.evaluation.predictor_data import RoutedText
    from gangline.evaluation.predictor_hits import Hits
    from gangline.evaluation.predictor_training import Trained

Kind = Literal["sida", "expertflow", "pre-gate", "read-me", "token-id"]
Mode = Literal["hint", "execute"]


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How a command of this file computes."""

    threads: Annotated[
        int | None, option("--threads", "-t", help="CPU threads. (Default: physical cores.)", min=1)
    ] = None
    seed: Annotated[int, option("--seed", help="Seed of first weights and of the order of the data.")] = 0

    @property
    def compute(self) -> ComputeOptions:
        """The same for loading a model."""
        return ComputeOptions(threads=self.threads, seed=self.seed)


Texts = Annotated[
    list[Path],
    option("--data", metavar="FILE", help="Text to run through the model, plain or .jsonl; repeat."),
]
TraceFolder = Annotated[
    Path | None,
    option("--trace", metavar="DIR", help="A trace of the model instead of text (recorded with --logits)."),
]
Window = Annotated[int, option("--window", help="--data: tokens of one document.", min=8)]
Top = Annotated[int, option("--top", help="The k of the top-k hash hit rate.", min=1)]


def train(
    out: Output,
    model: ModelArgument,
    budget: BudgetOptions,
    work: WorkOptions,
    data: Texts = [],  # noqa: B006 - typer copies it
    trace: TraceFolder = None,
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE", help="Where to save it (.safetensors).")
    ] = None,
    predictor: Annotated[
        # Not through option(): GANGLINE_PREDICTOR names the file of a trained one.
        Kind, typer.Option("--predictor", help="Which predictor.")
    ] = "sida",
    eval_data: Annotated[
        list[Path],
        option("--eval-data", metavar="FILE", help="Held-out text. (Default: the last tenth of each file.)"),
    ] = [],  # noqa: B006
    tokens: Annotated[int, option("--tokens", help="--data: tokens to learn from, about.", min=16)] = 40_000,
    window: Window = 256,
    epochs: Annotated[
        int | None, option("--epochs", help="Passes over the data. (Default: the predictor's.)", min=1)
    ] = None,
    lr: Annotated[
        float | None, option("--lr", help="Learning rate. (Default: the predictor's.)", min=0.0)
    ] = None,
    hidden: Annotated[
        int | None, option("--hidden", help="Width of the network. (Default: the paper's.)", min=4)
    ] = None,
    top: Top = 3,
) -> None:
    """Train a predictor on what the model's routers did, and measure it on text that it has not seen."""
    if output is None:
        raise UsageError("say where to save the predictor: -o FILE.safetensors")
    from gangline.cli.loading import loaded
    from gangline.evaluation.predictor_data import split_by_place
    from gangline.evaluation.predictor_hits import baselines, measure_hits, network_scorer
    from gangline.evaluation.predictor_training import EXTRAS, TrainingSettings, train_predictor

    with loaded(model, budget, work.compute) as ready:
        extras = EXTRAS[predictor]
        known = _documents(ready, model, data, trace, window, tokens, extras)
        if eval_data:
            share = max(window, tokens // 8)
            learn, test = known, _documents(ready, model, eval_data, None, window, share, extras)
        else:
            learn, test = split_by_place(known)
        settings = TrainingSettings(epochs=epochs, lr=lr, hidden=hidden, seed=work.seed)
        with _bar(f"training {predictor}", "step") as progress:
            trained = train_predictor(predictor, ready.model, learn, settings, progress)
        experts = [layer.experts for layer in ready.model.gangline.geometry.layers]
        with out_of_grad():
            scorers = {predictor: network_scorer(predictor, trained.network, ready.model)}
            hits = measure_hits(scorers | baselines(learn, experts[: len(learn[0].chosen)]), test, top=top)
        about = _about(ready, model, trained, learn, hits[0])
        from gangline.policies.predictors.saved import save_predictor

        save_predictor(output, trained.kind, trained.network, trained.config, about)
    size = output.stat().st_size
    out.data({"predictor": str(output), "bytes": size, "about": about, "hits": [h.to_dict() for h in hits]})
    out.show(f"{output}: {predictor}, {size / 2**20:.1f} MiB, learnt from {about['learnt_tokens']:,} tokens")
    _show_hits(out, hits)


def evaluate(
    out: Output,
    model: ModelArgument,
    budget: BudgetOptions,
    work: WorkOptions,
    predictor: Annotated[
        Path | None, option("--predictor", metavar="FILE", help="A file of 'gangline predict train'.")
    ] = None,
    data: Texts = [],  # noqa: B006
    trace: TraceFolder = None,
    tokens: Annotated[int, option("--tokens", help="--data: tokens to judge by, about.", min=16)] = 8192,
    window: Window = 256,
    top: Top = 3,
    mode: Annotated[
        Mode,
        option(
            "--mode",
            help="hint: hits only. execute: also what it costs to run SiDA's choice instead of the router's.",
        ),
    ] = "hint",
    choices: Annotated[
        int | None,
        option("--choices", help="execute: experts per token. (Default: as many as the model's.)", min=1),
    ] = None,
) -> None:
    """Measure a saved predictor on text that it should not have seen, beside what needs no training."""
    if predictor is None:
        raise UsageError("name the predictor: --predictor FILE (made by 'gangline predict train')")
    from gangline.policies.predictors.identity import require_same_model
    from gangline.policies.predictors.saved import load_predictor

    saved = load_predictor(predictor)
    if mode == "execute" and saved.kind != "sida":
        raise UsageError(f"{predictor} is a {saved.kind} predictor; --mode execute is for sida alone")
    from gangline.cli.loading import loaded
    from gangline.evaluation.predictor_hits import crossed_baselines, measure_hits, network_scorer
    from gangline.evaluation.predictor_training import EXTRAS

    with loaded(model, budget, work.compute) as ready, out_of_grad():
        require_same_model(saved.about, ready.model.gangline.view, predictor)
        documents = _documents(ready, model, data, trace, window, tokens, EXTRAS[saved.kind])
        experts = [layer.experts for layer in ready.model.gangline.geometry.layers]
        scorers = {saved.kind: network_scorer(saved.kind, saved.network, ready.model)}
        beside = crossed_baselines(documents, experts[: len(documents[0].chosen)])
        hits = measure_hits(scorers | beside, documents, top=top)
        report: dict[str, Any] = {"hits": [h.to_dict() for h in hits]}
        if mode == "execute":
            from gangline.evaluation.execute_fidelity import execution_fidelity

            with _bar("exact and executed", "doc") as progress:
                fidelity = execution_fidelity(
                    ready.model, saved.network, documents, choices=choices, progress=progress
                )
            report["fidelity"] = fidelity.to_dict()
    out.data({"predictor": str(predictor), "about": dict(saved.about), "mode": mode, **report})
    out.show(f"{predictor}: {saved.kind} of {saved.about.get('model')}, {hits[0].tokens:,} tokens")
    _show_hits(out, hits, layers=True)
    if mode == "execute":
        out.show(fidelity.describe())


def thresholds(
    out: Output,
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="Folder that 'gangline trace' wrote.", show_default=False)
    ],
    output: Annotated[
        Path | None, option("--output", "-o", metavar="FILE", help="Where to write the policy (.yaml).")
    ] = None,
    high: Annotated[
        float,
        option("--high", help="Share of the experts' uses to keep in full precision.", min=0.0, max=1.0),
    ] = 0.67,
    skip: Annotated[
        float, option("--skip", help="Share to leave out; the rest is low.", min=0.0, max=1.0)
    ] = 0.03,
) -> None:
    """Fit the thresholds of HOBBIT's two precisions to recorded weights, and write a policy with them."""
    if output is None or output.suffix not in (".yaml", ".yml"):
        raise UsageError("say where to write the policy: -o FILE.yaml")
    from gangline.evaluation.thresholds import fit_to_trace
    from gangline.traces import open_trace

    fit = fit_to_trace(open_trace(trace), high, skip)
    output.write_text(fit.composition(), encoding="utf-8")
    out.data({"policy": str(output), **fit.to_dict()})
    out.show(f"{output}: HOBBIT for {fit.model}, T1 {fit.high:g}, T2 {fit.low:g}, from {fit.tokens:,} tokens")
    out.show(f"on this trace: {fit.words()}")
    for note in fit.notes:
        out.show(f"note: {note}")
    out.show(f"use: --policy {output} --mode mixed (gangline check measures what it costs)")


def _documents(
    ready: "Loaded",
    name: str,
    data: list[Path],
    trace: Path | None,
    window: int,
    tokens: int,
    extras: Any,
) -> "list[RoutedText]":
    """Record text, or read a trace."""
    if bool(data) == bool(trace):
        raise UsageError("give either --data FILE or --trace DIR")
    from gangline.evaluation.predictor_data import recorded, routed_texts, texts_within
    from gangline.traces import open_trace

    if trace is not None:
        found = open_trace(trace)
        mine = ready.model.gangline.geometry.layers
        theirs = found.header.layers
        if [x.experts for x in theirs] != [x.experts for x in mine[: len(theirs)]]:
            raise UsageError(
                f"{trace} is a trace of {found.header.model}, whose layers differ from those of {name}; "
                f"record one with 'gangline trace {name}'"
            )
        return routed_texts(found)
    longest = min(window, ready.model.gangline.plan.rows)
    items = texts_within(data, ready.tokenizer, window=longest, tokens=tokens)
    with (
        _bar("recording", "token") as progress,
        recorded(
            ready.model, name, items, extras=extras, tokenizer=ready.tokenizer, on_item=progress
        ) as found,
    ):
        return routed_texts(found)


def _about(
    ready: "Loaded", name: str, trained: "Trained", learn: "list[RoutedText]", hits: "Hits"
) -> dict[str, Any]:
    """Return what the file says of itself."""
    from gangline import __version__
    from gangline.policies.predictors.identity import describe_model

    view = ready.model.gangline.view
    return {
        **describe_model(view, name, view.blocks[: len(learn[0].chosen)]),
        "training": trained.settings,
        "loss": trained.loss,
        "learnt_tokens": sum(len(document.ids_T) for document in learn),
        "learnt_from": sorted({document.file for document in learn}),
        "held_out": {"tokens": hits.tokens, **{m: hits.mean(m) for m in ("top1", "topk", "recall")}},
        "gangline": __version__,
    }


@contextmanager
def out_of_grad() -> Iterator[None]:
    """Compute without gradients, which the expert store does not give."""
    import torch

    with torch.no_grad():
        yield


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Any]:
    """Yield ``progress(done, total, loss=None)``, which draws a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, unit_scale=unit == "token", disable=None) as shown:

        def progress(done: int, total: int, loss: float | None = None) -> None:
            shown.total = total
            shown.update(done - shown.n)
            if loss is not None:
                shown.set_postfix_str(f"loss {loss:.4f}", refresh=False)

        yield progress


def _show_hits(out: Output, hits: "list[Hits]", *, layers: bool = False) -> None:
    from rich.table import Table

    top = hits[0].top
    if layers:
        table = Table("layer", *(f"{h.name}: top-1 / top-{top}" for h in hits), box=None)
        for number in sorted({layer.layer for h in hits for layer in h.layers}):
            by_name = [{layer.layer: layer for layer in h.layers}.get(number) for h in hits]
            table.add_row(
                str(number), *("-" if x is None else f"{x.top1:.1%} / {x.topk:.1%}" for x in by_name)
            )
        out.show(table)
    table = Table("held-out text", "top-1 hits", f"top-{top} hits", "recall at K", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for h in hits:
        table.add_row(h.name, *(f"{h.mean(metric):.1%}" for metric in ("top1", "topk", "recall")))
    out.show(table)


group = typer.Typer(
    name="predict",
    help="Learn from recorded routing: predictors and what they are worth, and HOBBIT's thresholds.",
    no_args_is_help=True,
)
command(group, "train")(train)
command(group, "eval")(evaluate)
command(group, "thresholds")(thresholds)
