"""Where the arrays of Samoyeds matrices lie, as the kernel's table of addresses.

Shape suffixes: E experts, part 0 and 1 (gate and up; a plain matrix fills part 0 alone), 4 addresses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.core.layout import FieldSpec
from gangline.formats import get_codec
from gangline.formats.samoyeds import TILE, SamoyedsCodec

ALIGN = 16
Addresses = tuple[int, int, int, int]


@dataclass(frozen=True)
class PartShape:
    """Sizes that all experts' matrices of one kind share, in the kernel's words.

    Attributes:
        codec: of the matrix.
        out_rows: output features of a part.
        in_columns: input features.
        columns: K: input features, filled up.
        sub_pitch: compressed rows of the whole stored matrix.
        row_tiles: tiles of 16 compressed rows of a part.
    """

    codec: SamoyedsCodec
    out_rows: int
    in_columns: int
    columns: int
    sub_pitch: int
    row_tiles: int

    @classmethod
    def of(cls, spec: FieldSpec, parts: int = 1) -> "PartShape":
        """Sizes of a stored matrix of ``parts`` parts one below the other."""
        codec = get_codec(spec.codec)
        assert isinstance(codec, SamoyedsCodec)
        rows, columns = spec.shape
        pattern = codec.pattern
        compressed = -(-pattern.blocks(rows) * pattern.n // TILE) * TILE
        of_part = -(-pattern.blocks(rows // parts) * pattern.n // TILE)
        return cls(codec, rows // parts, columns, pattern.columns(columns), compressed, of_part)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.codec.values.groups(self.columns // 2)

    def arguments(self) -> tuple[int, ...]:
        """The kernel's arguments from ``columns`` to ``groups``."""
        pattern, group = self.codec.pattern, self.codec.values.group
        sizes = (self.columns, self.in_columns, self.sub_pitch, self.row_tiles, self.out_rows)
        return (*sizes, pattern.v, group, self.groups)

    def addresses(self, raw: Tensor, stored_rows: int, part: int = 0) -> Addresses:
        """Addresses of values, metadata, scales and sub-rows of a part.

        Raises:
            FormatError: the bytes are not aligned as the kernel reads them.
        """
        start = raw.data_ptr()
        if start % ALIGN:
            raise FormatError(
                f"{self.codec.name}: a GPU kernel reads matrices that start at a multiple of {ALIGN} bytes; "
                "copy this one to memory of its own"
            )
        tile = part * self.row_tiles
        row = tile * TILE
        skip = {
            "values": row * self.columns * self.codec.values.width // 16,
            "meta": tile * self.columns // 64 * 128,
            "scales": row * self.groups * 2,
            "sub": row,
        }
        at = self.codec.offsets((stored_rows, self.in_columns))
        values, meta, scales, sub = (
            start + at[name][0] + skip[name] if at[name][1] else 0
            for name in ("values", "meta", "scales", "sub")
        )
        return values, meta, scales, sub


def cannot_split(spec: FieldSpec) -> str | None:
    """Why the halves of a fused gate/up matrix are no matrices of their own, or None if they are."""
    codec = get_codec(spec.codec)
    assert isinstance(codec, SamoyedsCodec)
    rows, pattern = spec.shape[0] // 2, codec.pattern
    if rows % pattern.m or pattern.blocks(rows) * pattern.n % TILE:
        return f"{spec.name} has {rows} rows each for gate and up, no multiple of {TILE * pattern.m}"
    return None


def address_table(parts: Sequence[Sequence[Addresses]], device: torch.device) -> Tensor:
    """``[E, 2, 4]`` int64 on the device; a missing second part is zeros."""
    none = (0, 0, 0, 0)
    rows = [[*of_expert, none][:2] for of_expert in parts]
    return torch.tensor(rows, dtype=torch.int64).to(device)
