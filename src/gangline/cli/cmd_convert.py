"""``gangline convert``: a dense model to a MoE, or a MoE to a GGUF file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gangline.cli.options import ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError

GGUFType = Literal["bf16", "f16", "f32", "q8_0", "q4_0"]


def convert(
    out: Output,
    model: ModelArgument,
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder, or .gguf file, to write.")],
    to: Annotated[Literal["moe", "gguf"], option("--to", help="What to make.")] = "moe",
    text: Annotated[
        str | None,
        option("--text", metavar="FILE", help="moe: text from which neurons are assigned to experts."),
    ] = None,
    experts: Annotated[int, option("--experts", help="moe: experts per layer.", min=2)] = 8,
    top_k: Annotated[int, option("--top-k", help="moe: experts per token.", min=1)] = 2,
    width: Annotated[
        int | None,
        option("--width", help="moe: neurons per expert. (Default: the dense width / top-k / 4 * 3.)"),
    ] = None,
    type: Annotated[GGUFType, option("--type", help="gguf: type of the matrices.")] = "bf16",
    revision: Annotated[
        str | None, option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
) -> None:
    """Make a MoE from a dense model (approximate), or a GGUF file from a MoE."""
    from gangline.evaluation.plain import find_checkpoint

    target = Path(output).expanduser()
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UsageError(f"{target} exists already; name another place, or remove it first")
    checkpoint = find_checkpoint(model, revision)
    if to == "gguf":
        _gguf(out, checkpoint.folder, target, type)


def _gguf(out: Output, folder: Path, target: Path, type: GGUFType) -> None:
    from gangline.checkpoint.gguf_writer import write_gguf
    from gangline.cli.progress import byte_bar
    from gangline.core.sizes import format_size

    with byte_bar(target.name) as progress:
        write_gguf(folder, target, type=type, progress=progress)
    size = target.stat().st_size
    out.data({"output": str(target), "type": type, "bytes": size})
    out.show(f"{target}: {format_size(size)}, {type}")
