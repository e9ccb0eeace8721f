"""All tensors of a safetensors checkpoint by name, from headers alone: one file, shards, or a Hub model."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gangline.checkpoint.hub import hub_errors
from gangline.checkpoint.safetensors_header import TensorEntry, parse_header, read_header
from gangline.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class SafetensorsIndex:
    """Where every tensor of a checkpoint lies.

    Attributes:
        files: the safetensors files; for a model on the Hub only their names.
        tensors: every tensor by name.
        local: whether ``files`` exist here. If not, offsets count from the start of each file's data.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    local: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "SafetensorsIndex":
        """Read the headers of a folder's safetensors files.

        These are ``model.safetensors``, else the shards named by ``model.safetensors.index.json`` (the order
        of transformers), else all ``*.safetensors`` files.

        Raises:
            CheckpointError: no safetensors file, a missing shard, a broken header, a tensor that two files
                hold or that the index promises and no file holds.
        """
        folder = Path(folder)
        if (folder / SINGLE_FILE).is_file():
            return cls._join(folder, (folder / SINGLE_FILE,), {})
        if (folder / INDEX_FILE).is_file():
            weight_map = _read_weight_map(folder / INDEX_FILE)
            files = tuple(folder / name for name in sorted(set(weight_map.values())))
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}; "
                    "download the checkpoint again"
                )
            return cls._join(folder, files, weight_map)
        files = tuple(
            path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")
        )
        if not files:
            raise CheckpointError(
                f"{folder}: no safetensors file here; name a folder that holds {SINGLE_FILE} or shards"
            )
        return cls._join(folder, files, {})

    @classmethod
    def from_hub(cls, repo: str, revision: str | None = None) -> "SafetensorsIndex":
        """Fetch only the headers of a model on the Hub (some hundred kilobytes).

        Raises:
            CheckpointError: no such model, no access, no network, or no safetensors files.
        """
        from huggingface_hub import get_safetensors_metadata

        with hub_errors(repo):
            metadata = get_safetensors_metadata(repo, revision=revision)
        names = sorted(metadata.files_metadata)
        tensors: dict[str, TensorEntry] = {}
        for number, name in enumerate(names):
            infos = metadata.files_metadata[name].tensors
            raw = {
                tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
                for tensor, info in infos.items()
            }
            data_bytes = max((info.data_offsets[1] for info in infos.values()), default=0)
            entries = parse_header(json.dumps(raw).encode(), data_bytes, Path(repo, name), number, 0)
            tensors.update((entry.name, entry) for entry in entries)
        return cls(tuple(Path(name) for name in names), tensors, local=False)

    @classmethod
    def _join(
        cls, folder: Path, files: tuple[Path, ...], weight_map: Mapping[str, str]
    ) -> "SafetensorsIndex":
        tensors: dict[str, TensorEntry] = {}
        for number, path in enumerate(files):
            for entry in read_header(path, number):
                other = tensors.get(entry.name)
                owner = weight_map.get(entry.name)
                if other is not None and owner is None:
                    raise CheckpointError(
                        f"{folder}: tensor {entry.name} is in both {files[other.file].name} and {path.name}; "
                        "remove the file that does not belong to this checkpoint"
                    )
                if owner is None or folder / owner == path:
                    tensors[entry.name] = entry
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            raise CheckpointError(
                f"{folder / weight_map[lost[0]]}: tensor {lost[0]}, promised by {INDEX_FILE}, is not in it; "
                "download the checkpoint again"
            )
        return cls(files, tensors)

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor into memory of its own, through plain reads.

        Raises:
            CheckpointError: no such tensor, a dtype without torch counterpart, or a file that ends too early.
        """
        import torch

        entry = self.entry(name)
        dtype = _torch_dtypes().get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.files[entry.file]}: tensor {name} has dtype {entry.dtype}, which torch lacks"
            )
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        with open_for_reads(self.files[entry.file]) as stream:
            read_into(stream, entry.offset, buffer, self.files[entry.file])
        return (
            buffer.view(dtype).reshape(entry.shape) if entry.nbytes else torch.empty(entry.shape, dtype=dtype)
        )

    def entry(self, name: str) -> TensorEntry:
        """Look a tensor up; :class:`CheckpointError` names it if it is not there."""
        try:
            return self.tensors[name]
        except KeyError:
            where = self.files[0].parent if self.files else "the checkpoint"
            raise CheckpointError(
                f"{where}: tensor {name} is missing; download the checkpoint again"
            ) from None

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.tensors.values())


def open_for_reads(path: Path) -> FileIO:
    """Open a file without a buffer for :func:`read_into`; :class:`CheckpointError` if that is impossible."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error


def read_into(stream: FileIO, offset: int, buffer: "torch.Tensor", path: Path) -> None:
    """Fill a 1-D uint8 CPU tensor from ``offset`` of an unbuffered file.

    Raises:
        CheckpointError: the file ends before the tensor is full, or cannot be read.
    """
    view = memoryview(buffer.numpy().data)
    done = 0
    try:
        while done < len(view):
            count = os.preadv(stream.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{path}: the file is truncated at byte {offset + done}; download it again"
                )
            done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from error


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({str(error)[:80]}); download it again"
        ) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise CheckpointError(
                f"{path}: names no file of this folder for tensor {tensor} ({name!r}); download it again"
            )
    return weight_map


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _torch_dtypes() -> "dict[str, torch.dtype]":
    import torch

    names = {
        "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
        "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
        "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
    }  # fmt: skip
    return {name: getattr(torch, attribute) for name, attribute in names.items()}
