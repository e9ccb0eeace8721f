"""Shards: numbered safetensors files with whole documents, each written in one step."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gangline.traces.files import write_whole
from gangline.traces.header import TraceError
from gangline.traces.rows import Array


@dataclass(frozen=True)
class Document:
    """One document or request of a trace.

    Attributes:
        number: as in the column ``doc``.
        source: where the text comes from, in words.
        tokens: rows of it in the trace.
        sha256: of its input ids, so that traces can be compared without their text.
        labels: kind and name.
    """

    number: int
    source: str
    tokens: int
    sha256: str
    labels: dict[str, str] = field(default_factory=dict)


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards of a trace in order, up to the first gap."""
    paths: list[Path] = []
    while (path := folder / f"shard-{len(paths):06d}.safetensors").is_file():
        paths.append(path)
    return paths


def write_shard(
    folder: Path, number: int, arrays: Mapping[str, Array], documents: Sequence[Document]
) -> None:
    """Write one shard in one step."""
    metadata = {"documents": json.dumps([asdict(document) for document in documents], ensure_ascii=False)}
    path = folder / f"shard-{number:06d}.safetensors"
    write_whole(path, lambda partial: save_file(dict(arrays), partial, metadata=metadata))


def read_documents(path: Path) -> list[Document]:
    """Return the documents of a shard, without reading its rows.

    Raises:
        TraceError: the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as shard:
            return [Document(**item) for item in json.loads((shard.metadata() or {})["documents"])]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TraceError(
            f"{path} is damaged ({error}); remove it and the shards after it, then resume"
        ) from error


def read_arrays(path: Path, prefixes: Sequence[str]) -> dict[str, Array]:
    """Return the arrays of a shard whose names begin with one of ``prefixes``.

    Raises:
        TraceError: the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as shard:
            names = [name for name in shard.keys() if name.startswith(tuple(prefixes))]  # noqa: SIM118
            return {name: shard.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise TraceError(
            f"{path} is damaged ({error}); remove it and the shards after it, then resume"
        ) from error
