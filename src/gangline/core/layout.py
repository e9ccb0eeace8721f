"""How one expert lies in bytes: an ordered list of matrices, each with a codec, and where to read them.

Nothing here touches a file or a tensor: these are the words that readers, the store and the kernels share.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gangline.core.keys import ExpertKey


@dataclass(frozen=True)
class FieldSpec:
    """One matrix of an expert.

    Attributes:
        name: ``gate_up`` (both fused), ``gate``, ``up`` or ``down``.
        shape: rows and columns exactly as stored: ``(out, in)``, or ``(in, out)`` if ``transposed``.
        codec: name of the codec of its bytes (``bf16``, ``fp16``, ``fp32``, ``int4g32``, ``ggml:Q4_0``, ...).
        nbytes: bytes of the encoded matrix.
        transposed: whether the matrix is stored as ``(in, out)``.
    """

    name: str
    shape: tuple[int, int]
    codec: str
    nbytes: int
    transposed: bool = False


@dataclass(frozen=True)
class ExpertLayout:
    """The matrices of every expert of one layer, in slot order: always ``down`` last."""

    fields: tuple[FieldSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert without padding."""
        return sum(field.nbytes for field in self.fields)


@dataclass(frozen=True)
class ModuleField:
    """Where a model's experts module keeps one matrix of every expert.

    Attributes:
        name: ``gate_up``, ``gate``, ``up`` or ``down``.
        parameter: path below the experts module; ``{expert}`` stands for the id where experts are modules.
        shape: rows and columns of one expert's matrix as stored.
        transposed: whether these are ``(in, out)``.
    """

    name: str
    parameter: str
    shape: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a file; ``file`` indexes ``ExpertCatalog.files``."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertCatalog:
    """Where every expert of a model can be read.

    Attributes:
        files: the files, each read only.
        layouts: one layout per MoE layer.
        extents: for each expert, one extent per field of its layout; neighbouring extents may touch, so that
        a
            reader may merge them into one read.
        checksums: CRC-32 of an expert's bytes in field order, where the files carry one (expert packs do).
    """

    files: tuple[Path, ...]
    layouts: tuple[ExpertLayout, ...]
    extents: dict[ExpertKey, tuple[Extent, ...]]
    checksums: dict[ExpertKey, int] | None = None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(extent.nbytes for extents in self.extents.values() for extent in extents)
