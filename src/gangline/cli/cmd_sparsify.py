"""``gangline sparsify``: prune the experts of a MoE under the two-level pattern of Samoyeds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gangline.cli.options import ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError
from gangline.core.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from gangline.evaluation.sparsification import SparsifyReport

SparsifyMethod = Literal["magnitude", "wanda", "sparsegpt", "alps"]
_MUCH = 1.1


OutputOption = Annotated[
    Path | None,
    option("--output", "-o", metavar="DIR", help="Folder to write, packed: this program runs it."),
]
DenseOption = Annotated[
    Path | None,
    option("--dense", metavar="DIR", help="Folder to write with the zeros stored: transformers loads it."),
]
PatternOption = Annotated[
    str,
    option("--pattern", metavar="N:M:V", help="1:2:32 and the like: 75 % zeros; 3:4:32: 62.5; 2:4: 50."),
]
MethodOption = Annotated[
    SparsifyMethod, option("--method", help="How weights are chosen, and the others corrected.")
]
ValuesOption = Annotated[
    str | None,
    option("--values", metavar="TYPE", help="bf16, fp16, int8, int4, int4g64. (Default: as stored.)"),
]
DataOption = Annotated[
    Path | None, option("--data", metavar="FILE", help="Text to calibrate on, of the kind you will use.")
]
HeldOutOption = Annotated[
    Path | None,
    option("--held-out", metavar="FILE", help="Text to judge by. (Default: the last tenth of --data.)"),
]
TokensOption = Annotated[int, option("--tokens", help="Calibration tokens at most.", min=2)]
WindowOption = Annotated[int, option("--window", help="Tokens of one piece of text.", min=2)]
MinTokensOption = Annotated[
    int, option("--min-tokens", help="Experts with fewer are calibrated on the layer's tokens.", min=1)
]
DampingOption = Annotated[
    float,
    option("--damping", help="The larger, the more cautious corrections are; 0.1 for little text."),
]
PermuteOption = Annotated[
    bool, option("--permute", help="Order the intermediate channels so that more is kept.")
]
ReconstructOption = Annotated[
    int,
    option(
        "--reconstruct",
        metavar="SWEEPS",
        help="Fit the pruned layers to the original's outputs; 2 is a good number.",
        min=0,
    ),
]
DistillTokensOption = Annotated[
    int,
    option(
        "--distill-tokens",
        metavar="N",
        help="Let what is kept learn from the original on so many tokens; needs memory for all experts.",
        min=0,
    ),
]
DistillTextOption = Annotated[
    float,
    option(
        "--distill-text",
        metavar="SHARE",
        help="With --distill-tokens: learn the text itself too, to so large a share; it adapts to the text.",
        min=0,
        max=1,
    ),
]
ResumeOption = Annotated[
    Path | None,
    option(
        "--resume",
        metavar="DIR",
        help="With --distill-tokens: note there every ten minutes how far it is; if begun there, go on.",
    ),
]
NoMeasureOption = Annotated[bool, option("--no-measure", help="Do not measure perplexity before and after.")]


def sparsify(
    out: Output,
    model: ModelArgument,
    output: OutputOption = None,
    dense: DenseOption = None,
    pattern: PatternOption = "2:4",
    method: MethodOption = "sparsegpt",
    values: ValuesOption = None,
    data: DataOption = None,
    held_out: HeldOutOption = None,
    tokens: TokensOption = 32768,
    window: WindowOption = 512,
    min_tokens: MinTokensOption = 128,
    damping: DampingOption = 0.01,
    permute: PermuteOption = False,
    reconstruct: ReconstructOption = 0,
    distill_tokens: DistillTokensOption = 0,
    distill_text: DistillTextOption = 0.0,
    resume: ResumeOption = None,
    no_measure: NoMeasureOption = False,
    revision: Annotated[
        str | None, option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
) -> None:
    """Prune the experts to 50, 62.5, 75 % zeros or more (approximate), and say what it cost."""
    if data is None:
        raise UsageError("give --data FILE: text of the kind that the model will see")
    for folder in (output, dense):
        if folder is not None and folder.exists():
            raise UsageError(f"{folder} exists already; name another place, or remove it first")
    from gangline.compress.sparsify import SparsifySettings
    from gangline.evaluation.sparsification import SparsifyTexts, sparsify_checkpoint

    settings = SparsifySettings(
        pattern=pattern,
        method=method,
        precision=values or "stored",
        min_tokens=min_tokens,
        damping=damping,
        permute=permute,
        reconstruct=reconstruct,
        distill_tokens=distill_tokens,
        distill_text=distill_text,
    )
    texts = SparsifyTexts(_read(data), None if held_out is None else _read(held_out), tokens, window=window)
    with _bar() as progress:
        report = sparsify_checkpoint(
            model,
            output,
            texts=texts,
            settings=settings,
            dense=dense,
            measure=not no_measure,
            revision=revision,
            progress=progress,
            resume=resume,
        )
    out.data(report.to_dict())
    if not out.json:
        out.show(_table(report))
        for line in _lines(report):
            out.show(line)


def _table(report: "SparsifyReport") -> "Table":
    from rich.table import Table

    table = Table(title=f"{report.model}: {report.settings.pattern}, {report.settings.method}")
    for heading in ("layer", "kept energy", "lowest", "expert", "output error", "few tokens"):
        table.add_column(heading, justify="left" if heading in ("layer", "few tokens") else "right")
    for layer in report.layers:
        means = {e.expert: sum(m.kept for m in e.matrices) / len(e.matrices) for e in layer.experts}
        lowest = min(means, key=lambda expert: means[expert])
        error = "" if layer.error is None else f"{layer.error:.3f}"
        if layer.reconstructed is not None:
            error = "{:.3f} -> {:.3f}".format(*layer.reconstructed)
        few = ", ".join(map(str, layer.poor))
        table.add_row(layer.name, f"{layer.kept:.1%}", f"{means[lowest]:.1%}", str(lowest), error, few)
    return table


def _lines(report: "SparsifyReport") -> Iterator[str]:
    bits = f"{report.bits_per_weight:.3f} bits a weight instead of {report.stored_bits_per_weight:g}"
    ratio = report.stored_bits_per_weight / report.bits_per_weight
    yield f"experts: {format_size(report.expert_bytes)} packed, {bits} ({ratio:.2f} times smaller)"
    if report.poor:
        count = sum(len(experts) for experts in report.poor.values())
        yield (
            f"{count} experts saw fewer than {report.settings.min_tokens} tokens and were calibrated on "
            "their layer's; give more --data"
        )
    learned = report.distilled
    if learned is not None:
        first, last = learned.losses[0], learned.losses[-1]
        yield (
            f"distilled on {learned.tokens:,} tokens: {first:.3f} nats a token from the original at first, "
            f"{last:.3f} at last"
        )
    before, after = report.perplexity_before, report.perplexity_after
    if before is not None and after is not None:
        yield (
            f"perplexity on {report.held_out_tokens:,} held-out tokens: {before:.2f} before, "
            f"{after:.2f} after ({after / before:.2f}x)"
        )
        if after > _MUCH * before:
            yield f"that is a large loss: {', '.join(_remedies(report))} or more text may cost less"
    for kind, folder in report.folders.items():
        yield f"{kind}: {folder}"


def _remedies(report: "SparsifyReport") -> Iterator[str]:
    settings = report.settings
    if settings.codec.pattern.sparsity > 0.5:
        yield "a milder pattern (2:4)"
    if not settings.reconstruct:
        yield "--reconstruct 2"
    if settings.method != "alps":
        yield "--method alps"
    if not settings.distill_tokens:
        yield "--distill-tokens 1000000"


@contextmanager
def _bar() -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(disable=None) as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=done == 0)
            if total:
                if bar.total != total:
                    bar.reset(total)
                bar.update(done - bar.n)

        yield progress


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {file}: {error}") from error
