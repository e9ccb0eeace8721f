"""The header of one GGUF file: metadata and the place of every tensor, checked before allocating anything.

A file is the magic ``GGUF``, a version, two counts, key-value pairs, tensor descriptions, padding, and the
data. The ``gguf`` package knows the types; its own reader trusts counts and lengths, so a corrupt file can
make it allocate without end. This parser believes a number only after comparing it with the size of the file.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from gangline.core.errors import CheckpointError

_MAX_PAIRS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_STRINGS = 1 << 24
_MAX_NUMBERS = 1 << 24
_MAX_NAME = 1 << 16
_MAX_ALIGNMENT = 1 << 20
_SMALLEST_PAIR = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of ``number`` strings, which are not kept: transformers reads vocabularies itself."""

    number: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Strings


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: its GGUF name.
        shape: as in torch, columns last.
        type: name of its ggml type, for example ``Q4_0``.
        file: the file that holds it.
        offset: first byte in the file.
        nbytes: number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What the header of one file says.

    Attributes:
        path: the file.
        metadata: all key-value pairs.
        tensors: all tensors by name.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]


def require_gguf() -> ModuleType:
    """Return the ``gguf`` package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError('GGUF files need the gguf package; run pip install "gangline[gguf]"') from error
    module: ModuleType = gguf
    return module


@cache
def ggml_types() -> dict[int, tuple[str, int, int]]:
    """Every ggml type by number: name, weights per block, bytes per block."""
    gguf = require_gguf()
    return {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES}


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of one GGUF file; tensor data is not touched.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header contradicts itself.
    """
    require_gguf()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data).header()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error


class _Cursor:
    """A place in a mapped file; every step is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise self.broken("is no GGUF file (its first four bytes are not GGUF)")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            swapped = version and version % 65536 == 0
            raise self.broken("is big-endian" if swapped else f"has GGUF version {version}, not 2 or 3")
        tensors = self.count(_SMALLEST_TENSOR, _MAX_TENSORS, "tensors")
        pairs = self.count(_SMALLEST_PAIR, _MAX_PAIRS, "metadata entries")
        metadata: dict[str, Value] = {}
        for _ in range(pairs):
            key = self.name("metadata key")
            if key in metadata:
                raise self.broken(f"gives {key} twice")
            metadata[key] = self.value(int(self.number("I")), key)
        described = [self.tensor() for _ in range(tensors)]
        return GGUFHeader(self.path, metadata, self.place(described, metadata))

    def take(self, nbytes: int) -> int:
        """Step over ``nbytes`` and return where they start."""
        start = self.at
        if nbytes > self.size - start:
            raise self.broken("ends inside its header")
        self.at = start + nbytes
        return start

    def number(self, code: str) -> int | float | bool:
        form = "<" + code
        value: int | float | bool = struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, smallest: int, limit: int, what: str) -> int:
        """Read a count and refuse one whose items cannot fit in the rest of the file."""
        number = int(self.number("Q"))
        if number > limit or number * smallest > self.size - self.at:
            raise self.broken(f"is truncated or corrupt: it cannot hold {number} {what}")
        return number

    def name(self, what: str) -> str:
        length = self.count(1, _MAX_NAME, f"letters in a {what}")
        try:
            text = self.data[self.take(length) : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"has a {what} that is no text") from error
        if not text.isprintable() or not text:
            raise self.broken(f"has a {what} that is no text")
        return text

    def value(self, kind: int, key: str) -> Value:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = self.count(1, self.size, f"letters in {key}")
            return self.data[self.take(length) : self.at].decode("utf-8", errors="replace")
        if kind == _ARRAY:
            return self.array(key)
        raise self.broken(f"gives {key} the unknown type {kind}")

    def array(self, key: str) -> Value:
        kind = int(self.number("I"))
        if kind == _STRING:
            return self.strings(key)
        if kind not in _SCALARS:
            raise self.broken(f"gives {key} an array of the unknown type {kind}")
        width = struct.calcsize("<" + _SCALARS[kind])
        count = self.count(width, _MAX_NUMBERS, f"numbers in {key}")
        return struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.take(count * width))

    def strings(self, key: str) -> Strings:
        """Step over an array of strings; vocabularies are long, so this loop calls no other method."""
        number = self.count(8, _MAX_STRINGS, f"strings in {key}")
        read, data, last, at = struct.Struct("<Q").unpack_from, self.data, self.size - 8, self.at
        for _ in range(number):
            if at > last:
                break
            at += 8 + int(read(data, at)[0])
        self.take(at - self.at)
        return Strings(number)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read one description: name, shape with columns last, type number, offset in the data."""
        name = self.name("tensor name")
        dimensions = int(self.number("I"))
        if not 1 <= dimensions <= 4:
            raise self.broken(f"gives tensor {name} {dimensions} dimensions")
        shape = tuple(int(self.number("Q")) for _ in range(dimensions))[::-1]
        return name, shape, int(self.number("I")), int(self.number("Q"))

    def place(
        self, described: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Value]
    ) -> dict[str, GGUFTensor]:
        """Turn descriptions into byte ranges and check that each lies in the file."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.broken(f"has the alignment {alignment!r}, which is no power of two")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in described:
            if name in tensors:
                raise self.broken(f"describes tensor {name} twice")
            if number not in ggml_types():
                raise self.broken(
                    f"gives tensor {name} the type {number}, which the gguf package does not know"
                )
            kind, block, width = ggml_types()[number]
            if min(shape) < 1 or shape[-1] % block or offset % alignment:
                raise self.broken(
                    f"gives tensor {name} ({kind}) the impossible shape {shape} or offset {offset}"
                )
            nbytes = math.prod(shape) // block * width
            if start + offset + nbytes > self.size:
                raise self.broken(f"is truncated: tensor {name} lies beyond its end")
            tensors[name] = GGUFTensor(name, shape, kind, self.path, start + offset, nbytes)
        return tensors

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the file {what}; download it again or convert the model again")
