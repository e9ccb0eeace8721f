"""``gangline cache``: what gangline has written for itself, and a way to be rid of it."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from gangline.cli.command import command
from gangline.cli.options import option
from gangline.cli.output import Output
from gangline.cli.state import NOT_PASSED
from gangline.core.errors import PackError, UsageError
from gangline.core.home import cache_dir
from gangline.core.sizes import format_size

_PACKS = "packs"

Names = Annotated[list[str], typer.Argument(metavar="[NAME]...", help="Names as 'cache ls' prints them.")]


def entries() -> dict[str, Path]:
    """Return what lies in the cache by name, ``packs/3f2a...`` for example: everything two levels down."""
    root = cache_dir()
    return {
        f"{kind.name}/{item.name}": item
        for kind in sorted(path for path in root.iterdir() if path.is_dir())
        for item in sorted(kind.iterdir())
    }


def ls(out: Output) -> None:
    """List expert packs, made models and measured profiles with their sizes."""
    rows = [_describe(name, path) for name, path in entries().items()]
    out.data({"folder": str(cache_dir()), "entries": rows, "bytes": sum(row["bytes"] for row in rows)})
    from rich.table import Table

    table = Table("name", "size", "changed", title=str(cache_dir()), title_justify="left", box=None)
    for row in rows:
        table.add_row(row["name"], format_size(row["bytes"]), row["changed"])
    table.add_row("in all", format_size(sum(row["bytes"] for row in rows)), "")
    out.show(table)


def rm(
    out: Output,
    names: Names = [],  # noqa: B006 - typer copies it
    all: Annotated[bool, option("--all", help="Remove everything.")] = False,
    yes: Annotated[bool, option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove entries; they are made again when needed."""
    if bool(names) == all:
        raise UsageError("name what to remove (see 'gangline cache ls'), or give --all")
    chosen = entries() if all else {name: _find(name) for name in names}
    size = sum(_bytes(path) for path in chosen.values())
    if not yes and not typer.confirm(f"remove {len(chosen)} entries, {format_size(size)}?", err=True):
        raise typer.Abort
    for path in chosen.values():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    out.data({"removed": list(chosen), "bytes": size})
    out.show(f"removed {len(chosen)} entries, {format_size(size)}")


def verify(out: Output, names: Names = []) -> None:  # noqa: B006 - typer copies it
    """Read expert packs through and compare their checksums. Exit code 3 if one is damaged."""
    chosen = {name: _find(name) for name in names} or entries()
    packs = {name: path for name, path in chosen.items() if _is_pack(name)}
    if names and len(packs) < len(chosen):
        other = next(name for name in chosen if name not in packs)
        raise UsageError(f"{other} has no checksums; only names that begin with '{_PACKS}/' do")
    from gangline.checkpoint.pack import verify_pack

    results = []
    for name, path in packs.items():
        try:
            verify_pack(path)
            results.append({"name": name, "ok": True, "detail": ""})
        except PackError as error:
            results.append({"name": name, "ok": False, "detail": str(error)})
    out.data({"entries": results, "ok": all(row["ok"] for row in results)})
    for row in results:
        out.show(f"{'ok    ' if row['ok'] else 'FAIL  '} {row['name']} {row['detail']}".rstrip())
    out.show(f"{len(results)} expert packs verified")
    if not all(row["ok"] for row in results):
        raise typer.Exit(NOT_PASSED)


def _is_pack(name: str) -> bool:
    """Whether an entry is a finished pack; unfinished ones and locks begin with a dot."""
    kind, _, item = name.partition("/")
    return kind == _PACKS and not item.startswith(".")


def _find(name: str) -> Path:
    known = entries()
    if name not in known:
        raise UsageError(f"no {name!r} in {cache_dir()}; see 'gangline cache ls'")
    return known[name]


def _describe(name: str, path: Path) -> dict[str, Any]:
    changed = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="minutes")
    return {"name": name, "bytes": _bytes(path), "changed": changed, "path": str(path)}


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


group = typer.Typer(name="cache", help="List, remove or verify what gangline keeps on disk.")
for body in (ls, rm, verify):
    command(group, body.__name__)(body)
