"""The header of one safetensors file: names, dtypes, shapes and byte ranges, checked before use.

A file is eight bytes (length N of the header, little endian), N bytes of JSON, then the data; the byte ranges
in the JSON count from the end of the header and must tile the data without a hole.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gangline.core.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the file.
        dtype: safetensors dtype name, for example ``BF16``.
        shape: its dimensions.
        file: index of its file in ``SafetensorsIndex.files``.
        offset: first byte in the file.
        nbytes: number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


def read_header(path: Path, file: int) -> list[TensorEntry]:
    """Read and check the header of one file; the data is not touched.

    Args:
        path: a safetensors file.
        file: the index to note in each entry.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header contradicts itself.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or LENGTH_BYTES + length > size:
                raise _broken(path, f"is truncated: {size} bytes cannot hold its header")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, f"is not a safetensors file: it claims a header of {length} bytes")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    return parse_header(text, size - LENGTH_BYTES - length, path, file, LENGTH_BYTES + length)


def parse_header(text: bytes, data_bytes: int, path: Path, file: int, base: int) -> list[TensorEntry]:
    """Check the JSON text of a header.

    Args:
        text: the JSON bytes.
        data_bytes: bytes that follow the header in the file.
        path: named in errors.
        file: index to note in each entry.
        base: position of the data in the file, added to every offset.

    Raises:
        CheckpointError: as in :func:`read_header`.
    """
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"has a header that is not valid JSON ({str(error)[:80]})") from error
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise _broken(path, "has a header that is not a JSON object")
    _check_metadata(header.pop("__metadata__", {}), path)
    entries = [_entry(name, item, path, file, base) for name, item in header.items()]
    _check_tiling(entries, data_bytes, path, base)
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "has a __metadata__ entry that does not map text to text")


def _entry(name: str, item: object, path: Path, file: int, base: int) -> TensorEntry:
    if not isinstance(item, dict):
        raise _broken(path, f"describes tensor {name!r} by something that is not a JSON object")
    dtype = item.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"gives tensor {name!r} the unknown dtype {dtype!r}")
    shape, offsets = _sizes(item.get("shape")), _sizes(item.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise _broken(path, f"gives tensor {name!r} a shape or an offset that is not a list of sizes")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        needs = f"{dtype} of shape {list(shape)} takes {bits / 8:g}"
        raise _broken(path, f"gives tensor {name!r} {end - begin} bytes, but {needs}")
    return TensorEntry(name, dtype, shape, file, base + begin, end - begin)


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value):
        return tuple(value)
    return None


def _check_tiling(entries: list[TensorEntry], data_bytes: int, path: Path, base: int) -> None:
    end = base
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            what = "overlaps another" if entry.offset < end else "leaves a hole before it"
            raise _broken(path, f"places tensor {entry.name!r} so that it {what}")
        end += entry.nbytes
    if end - base > data_bytes:
        raise _broken(path, f"is truncated: its header promises {end} bytes and it has {base + data_bytes}")
    if end - base < data_bytes:
        raise _broken(path, f"has {base + data_bytes - end} bytes that belong to no tensor")


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: the file {what}; copy or download it again")
