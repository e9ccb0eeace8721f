"""The index of an expert pack: what ``experts.bin`` holds, and where.

A pack is a folder with ``experts.bin`` and ``index.json``. The records of one layer's experts follow one
another; a record is the fields of one expert without a gap, padded to a multiple of 4096 bytes. Offsets
follow from the layouts.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from gangline.core.errors import FormatError, PackError
from gangline.core.keys import ExpertKey
from gangline.core.layout import ExpertCatalog, ExpertLayout, Extent, FieldSpec
from gangline.formats import get_codec

FORMAT = "gangline expert pack"
VERSION = 1
ALIGNMENT = 4096
DATA_FILE = "experts.bin"
INDEX_FILE = "index.json"
FIELD_NAMES = ("gate_up", "gate", "up", "down")
_SIZE_LIMIT = 2**48


@dataclass(frozen=True)
class PackLayout:
    """Sizes and positions of all records.

    Attributes:
        layouts: one layout per MoE layer.
        experts: number of experts E of each layer.
    """

    layouts: tuple[ExpertLayout, ...]
    experts: tuple[int, ...]

    def record_bytes(self, layer: int) -> int:
        """Bytes from one expert to the next."""
        return -(-self.layouts[layer].nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of each layer, and at the end the size of the whole file."""
        runs = (count * self.record_bytes(layer) for layer, count in enumerate(self.experts))
        return tuple(accumulate(runs, initial=0))

    @property
    def nbytes(self) -> int:
        """Size of ``experts.bin``."""
        return self.starts[-1]

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all fields (padding left out) over the number of weights, in bits."""
        weights = bits = 0
        for layout, count in zip(self.layouts, self.experts, strict=True):
            weights += count * sum(field.shape[0] * field.shape[1] for field in layout.fields)
            bits += count * layout.nbytes * 8
        return bits / weights

    def extents(self) -> Iterator[tuple[ExpertKey, tuple[Extent, ...]]]:
        """The byte ranges of the fields of every expert."""
        starts = self.starts
        for layer, (layout, count) in enumerate(zip(self.layouts, self.experts, strict=True)):
            inner = list(accumulate((field.nbytes for field in layout.fields), initial=0))
            for expert in range(count):
                base = starts[layer] + expert * self.record_bytes(layer)
                fields = zip(inner, layout.fields, strict=False)
                yield (
                    ExpertKey(layer, expert),
                    tuple(Extent(0, base + at, field.nbytes) for at, field in fields),
                )

    def to_json(self) -> list[dict[str, Any]]:
        """One entry per layer."""
        return [
            {"experts": count, "fields": [asdict(field) for field in layout.fields]}
            for layout, count in zip(self.layouts, self.experts, strict=True)
        ]


@dataclass(frozen=True)
class PackIndex:
    """Everything about a finished pack.

    Attributes:
        key: what the pack was made for; a pack with another key is another model or precision.
        source: the checkpoint it came from, in words.
        layout: its records.
        checksums: per layer the CRC-32 of every expert's bytes (padding left out).
    """

    key: str
    source: str
    layout: PackLayout
    checksums: tuple[tuple[int, ...], ...]

    def catalog(self, folder: Path) -> ExpertCatalog:
        """The pack as a catalog of byte ranges."""
        sums = {
            ExpertKey(layer, expert): value
            for layer, values in enumerate(self.checksums)
            for expert, value in enumerate(values)
        }
        return ExpertCatalog((folder / DATA_FILE,), self.layout.layouts, dict(self.layout.extents()), sums)

    def to_json(self) -> dict[str, Any]:
        """What ``index.json`` holds."""
        layers = self.layout.to_json()
        for entry, sums in zip(layers, self.checksums, strict=True):
            entry["crc32"] = list(sums)
        return {
            "format": FORMAT,
            "version": VERSION,
            "key": self.key,
            "source": self.source,
            "bits_per_weight": self.layout.bits_per_weight,
            "nbytes": self.layout.nbytes,
            "layers": layers,
        }


def read_index(folder: Path) -> PackIndex:
    """Read and check ``index.json`` and the size of ``experts.bin``; the data is not read.

    Raises:
        PackError: the index is damaged or of another version, or the data file is missing or of another size.
    """
    path = folder / INDEX_FILE
    try:
        document = json.loads(path.read_text("utf-8"))
        size = (folder / DATA_FILE).stat().st_size
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror}: {error.filename})") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "is not valid JSON") from error
    index = parse_index(document, path)
    if size != index.layout.nbytes:
        raise _damaged(
            path.with_name(DATA_FILE), f"has {size} bytes where the index says {index.layout.nbytes}"
        )
    return index


def parse_index(document: object, path: Path) -> PackIndex:
    """Check the contents of an index; ``path`` is named in errors."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _damaged(path, "is not the index of an expert pack")
    if document.get("version") != VERSION:
        raise _damaged(
            path, f"has version {document.get('version')!r}, this gangline reads version {VERSION}"
        )
    key, source, layers = document.get("key"), document.get("source"), document.get("layers")
    if not isinstance(key, str) or not isinstance(source, str) or not isinstance(layers, list):
        raise _damaged(path, "lacks key, source or layers")
    layout = parse_layers(layers, path)
    if document.get("nbytes") != layout.nbytes:
        raise _damaged(path, f"says {document.get('nbytes')!r} bytes where its layers take {layout.nbytes}")
    checksums = tuple(
        parse_checksums(entry.get("crc32"), count, path)
        for entry, count in zip(layers, layout.experts, strict=True)
    )
    return PackIndex(key, source, layout, checksums)


def parse_layers(layers: list[Any], path: Path) -> PackLayout:
    """Check the layer entries of an index or a journal."""
    layouts, experts = [], []
    if not layers:
        raise _damaged(path, "has no layers")
    for entry in layers:
        if not isinstance(entry, dict) or not isinstance(entry.get("fields"), list) or not entry["fields"]:
            raise _damaged(path, "has a layer without fields")
        if not _is_size(entry.get("experts")):
            raise _damaged(path, "has a layer without a number of experts")
        layouts.append(ExpertLayout(tuple(_parse_field(field, path) for field in entry["fields"])))
        experts.append(entry["experts"])
    return PackLayout(tuple(layouts), tuple(experts))


def parse_checksums(values: object, count: int, path: Path) -> tuple[int, ...]:
    """Check one CRC-32 per expert."""
    if not isinstance(values, list) or len(values) != count:
        raise _damaged(path, f"does not have one checksum for each of {count} experts")
    if not all(type(value) is int and 0 <= value < 2**32 for value in values):
        raise _damaged(path, "has a checksum that is not a CRC-32")
    return tuple(values)


def _parse_field(field: object, path: Path) -> FieldSpec:
    if not isinstance(field, dict) or set(field) != {"name", "shape", "codec", "nbytes", "transposed"}:
        raise _damaged(path, "has an incomplete field")
    shape, codec = field["shape"], field["codec"]
    if (
        field["name"] not in FIELD_NAMES
        or not isinstance(field["transposed"], bool)
        or not isinstance(codec, str)
    ):
        raise _damaged(path, f"has a field of unknown kind {field['name']!r}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise _damaged(path, f"has a field with the shape {shape!r}")
    spec = FieldSpec(field["name"], (shape[0], shape[1]), codec, field["nbytes"], field["transposed"])
    try:
        nbytes = get_codec(codec).nbytes(spec.shape)
    except FormatError as error:
        raise _damaged(path, f"has a field that no codec reads ({error})") from error
    if nbytes != spec.nbytes:
        raise _damaged(path, f"gives a field {spec.nbytes!r} bytes where {codec} takes {nbytes}")
    return spec


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < _SIZE_LIMIT


def _damaged(path: Path, what: str) -> PackError:
    return PackError(f"{path} {what}; delete the folder {path.parent}, and it will be made again")
