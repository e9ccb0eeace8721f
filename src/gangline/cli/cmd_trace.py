"""``gangline trace``: record which experts every token uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gangline.cli.answer import SamplingOptions
from gangline.cli.options import BudgetOptions, ComputeOptions, ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError
from gangline.core.sizes import format_size

if TYPE_CHECKING:
    from gangline.cli.loading import Loaded
    from gangline.traces.texts import Item
    from gangline.traces.writer import TraceWriter

TraceMode = Literal["full", "ids", "counts"]


def trace(
    out: Output,
    model: ModelArgument,
    budget: BudgetOptions,
    compute: ComputeOptions,
    sampling: SamplingOptions,
    data: Annotated[
        list[Path],
        option("--data", metavar="FILE", help="Text to read, plain or .jsonl with text and labels; repeat."),
    ] = [],  # noqa: B006 - typer copies it
    prompts: Annotated[
        list[Path],
        option("--prompts", metavar="FILE", help="Prompts to answer, one a line, or .jsonl; repeat."),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None, option("--output", "-o", metavar="DIR", help="Folder of the trace.")
    ] = None,
    mode: Annotated[
        TraceMode, option("--mode", help="Experts and weights, experts only, or sums only.")
    ] = "full",
    logits: Annotated[bool, option("--logits", help="Also the logits of the routers.")] = False,
    inputs: Annotated[bool, option("--inputs", help="Also the inputs of the routers (large).")] = False,
    predictions: Annotated[
        bool, option("--predictions", help="--data: also the likeliest next token of every position.")
    ] = False,
    window: Annotated[int, option("--window", help="--data: tokens of one document.", min=2)] = 512,
    label: Annotated[
        list[str], option("--label", metavar="KIND=NAME", help="Label of all documents; repeat.")
    ] = [],  # noqa: B006
    limit: Annotated[int | None, option("--limit", help="Documents to record at most.", min=1)] = None,
    raw: Annotated[bool, option("--raw", help="--prompts: without the chat template.")] = False,
    resume: Annotated[bool, option("--resume", help="Go on with a recording that broke off.")] = False,
) -> None:
    """Record routing: of given text (--data), or while the model answers (--prompts)."""
    if output is None:
        raise UsageError("say where to write the trace: -o DIR")
    if bool(data) == bool(prompts):
        raise UsageError("give either --data FILE or --prompts FILE")
    labels = _labels(label)
    from gangline.cli.loading import loaded

    with loaded(model, budget, compute) as ready:
        from gangline.traces.describe import describe_recording
        from gangline.traces.hooks import Stack
        from gangline.traces.texts import prompt_items, text_items
        from gangline.traces.writer import TraceWriter

        stack: Stack | None = None
        if ready.model.config.is_encoder_decoder:
            stack = "encoder" if data else "decoder"
        if data:
            longest = min(window, ready.model.gangline.plan.rows)
            items = text_items(data, ready.tokenizer, window=longest, labels=labels)[:limit]
        else:
            items = prompt_items(prompts, ready.tokenizer, raw=raw, labels=labels)[:limit]
        generating = {"max_new_tokens": sampling.max_new_tokens, **sampling.generate_arguments()}
        header = describe_recording(
            ready.model,
            model,
            mode=mode,
            extras=[name for name, wanted in (("logits", logits), ("inputs", inputs)) if wanted],  # type: ignore[misc]
            source="text" if data else "generation",
            stack=stack,
            tokenizer=ready.tokenizer,
            expert_bytes=[layout.nbytes for layout in ready.model.gangline.catalog.layouts],
            revision=budget.revision,
            sampling={} if data else generating,
            seed=None if data else compute.seed,
        )
        kind = next(iter(items[0].labels), None) if mode == "counts" else None
        with TraceWriter(output, header, resume=resume, label_kind=kind) as writer:
            todo = items[writer.documents :]
            if not todo:
                out.note(f"{output} holds all {writer.documents} documents already")
            with _bar(len(items), writer) as on_item:
                _record(ready, writer, todo, on_item, stack, predictions, generating, compute.seed)
        _report(out, output, writer)


def _labels(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        kind, equals, name = pair.partition("=")
        if not (kind and equals and name):
            raise UsageError(f"--label {pair!r} must be KIND=NAME, for example domain=code")
        found[kind] = name
    return found


def _record(
    ready: "Loaded",
    writer: "TraceWriter",
    items: "list[Item]",
    on_item: Any,
    stack: Any,
    predictions: bool,
    generating: dict[str, Any],
    seed: int,
) -> None:
    from gangline.traces.record import record_generation, record_text
    from gangline.traces.recorder import Recorder

    special = getattr(ready.tokenizer, "all_special_ids", [])
    recorder = Recorder(writer, special)
    if writer.header.source == "text":
        record_text(ready.model, recorder, items, stack=stack, predictions=predictions, on_item=on_item)
        return
    ends = ready.model.generation_config.eos_token_id or ready.tokenizer.eos_token_id
    pad = ready.model.generation_config.pad_token_id or ready.tokenizer.pad_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    settings = {**generating, "eos_token_id": ends, "pad_token_id": first_end if pad is None else pad}
    record_generation(
        ready.model, recorder, items, settings=settings, seed=seed, stack=stack, on_item=on_item
    )


@contextmanager
def _bar(total: int, writer: "TraceWriter") -> Iterator[Any]:
    """Yield a function to call after each document, which draws a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(desc="recording", total=total, initial=writer.documents, unit="doc", disable=None) as bar:

        def on_item(_: object) -> None:
            bar.update()
            bar.set_postfix_str(f"{writer.tokens:,} tokens", refresh=False)

        yield on_item


def _report(out: Output, folder: Path, writer: "TraceWriter") -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    header = writer.header
    out.data(
        {
            "trace": str(folder),
            "documents": writer.documents,
            "tokens": writer.tokens,
            "bytes": size,
            "header": header.to_dict(),
        }
    )
    per_token = f", {size / writer.tokens:,.0f} bytes per token" if writer.tokens else ""
    out.show(
        f"{folder}: {writer.tokens:,} tokens in {writer.documents} documents, {len(header.layers)} MoE "
        f"layers, mode {header.mode}, {format_size(size)}{per_token}"
    )
    if any(layer.shared for layer in header.layers):
        out.show("note: shared experts see every token and are in no trace")
