"""``gangline convert``: a dense model to a MoE, or a MoE to a GGUF file."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gangline.cli.options import ModelArgument, option
from gangline.cli.output import Output
from gangline.core.errors import UsageError
from gangline.core.sizes import format_size

GGUFType = Literal["bf16", "f16", "f32", "q8_0", "q4_0"]


def convert(
    out: Output,
    model: ModelArgument,
    out_argument: Annotated[
        str | None,
        typer.Argument(
            metavar="[OUT]", help="Folder, or .gguf file, to write; or give -o.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None, option("--output", "-o", metavar="OUT", help="The same as an option.")
    ] = None,
    to: Annotated[Literal["moe", "gguf"], option("--to", help="What to make.")] = "moe",
    text: Annotated[
        str | None,
        option("--text", metavar="FILE", help="moe: text by which neurons are dealt out to experts."),
    ] = None,
    experts: Annotated[
        int | None, option("--experts", help="moe: experts per layer. (Default: 16.)", min=2)
    ] = None,
    top_k: Annotated[
        int | None, option("--top-k", help="moe: experts per token. (Default: 2.)", min=1)
    ] = None,
    width: Annotated[
        int | None,
        option("--width", help="moe: neurons per expert. (Default: 3/4 of the FFN active.)", min=1),
    ] = None,
    tokens: Annotated[
        int | None, option("--tokens", help="moe: tokens of the text to use. (Default: 32768.)", min=1)
    ] = None,
    type: Annotated[
        GGUFType | None, option("--type", help="gguf: type of the matrices. (Default: bf16.)")
    ] = None,
    revision: Annotated[
        str | None, option("--revision", help="Branch, tag or commit of a hub model.")
    ] = None,
) -> None:
    """Make a MoE from a dense model (approximate), or a GGUF file from a MoE."""
    sizes = {"experts": experts, "top_k": top_k, "width": width, "tokens": tokens}
    _refuse_foreign_flags(to, {"moe": {"text": text, **sizes}, "gguf": {"type": type}})
    if (out_argument is None) == (output is None):
        raise UsageError("say where to write, once: gangline convert MODEL OUT, or -o OUT")
    target = Path(out_argument or str(output)).expanduser()
    if target.exists():
        raise UsageError(f"{target} exists already; name another place, or remove it first")
    if to == "gguf":
        _gguf(out, _folder(model, revision), target, type or "bf16")
    else:
        _moe(
            out, model, revision, target, text, {key: size for key, size in sizes.items() if size is not None}
        )


def _refuse_foreign_flags(to: str, flags: dict[str, dict[str, Any]]) -> None:
    """Refuse flags that belong to the other target, rather than ignore them."""
    for target, given in flags.items():
        for name, value in given.items():
            if target != to and value is not None:
                raise UsageError(f"--{name.replace('_', '-')} means something with --to {target} only")


def _folder(model: str, revision: str | None) -> Path:
    from gangline.evaluation.plain import find_checkpoint

    checkpoint = find_checkpoint(model, revision)
    if checkpoint.gguf is not None:
        raise UsageError(
            f"{model} is a GGUF file already; to change its type start from the safetensors model"
        )
    return checkpoint.folder


def _gguf(out: Output, folder: Path, target: Path, type: GGUFType) -> None:
    from gangline.checkpoint.gguf_writer import write_gguf
    from gangline.cli.progress import byte_bar

    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder; make it first")
    with byte_bar(target.name) as progress:
        write_gguf(folder, target, type=type, progress=progress)
    size = target.stat().st_size
    out.data({"output": str(target), "type": type, "bytes": size})
    out.show(f"{target}: {format_size(size)}, {type}")


def _moe(
    out: Output, model: str, revision: str | None, target: Path, text: str | None, sizes: dict[str, int]
) -> None:
    if text is None:
        raise UsageError("a MoE is made by looking at text: give --text FILE, of the kind the model will see")
    words = _read(Path(text).expanduser())
    from gangline.compress.dense_to_moe import convert_dense
    from gangline.evaluation.plain import find_checkpoint

    checkpoint = find_checkpoint(model, revision)
    source = checkpoint.gguf or checkpoint.folder
    convert_dense(source, target, text=words, progress=sys.stderr.isatty(), **sizes)  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in target.iterdir())
    out.data({"output": str(target), "bytes": size, **sizes})
    out.show(f"{target}: {format_size(size)}; approximate: compare it with 'gangline run {target} PROMPT'")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {file}: {error}") from error
