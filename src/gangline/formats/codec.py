"""What every codec of one expert matrix offers, and the checks that all codecs share.

Shape suffixes in this folder: O rows (out), I columns (in), G groups of a row, N blocks or groups of the
whole matrix, L elements of a block or group, B bytes of a block or row.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gangline.core.errors import FormatError

Shape = tuple[int, int]

# Weights decoded or encoded at a time: few enough that the temporaries stay near the core and the peak memory
# small, many enough that the cost of launching torch operations does not show.
CHUNK = 1 << 18


class Codec(Protocol):
    """How one matrix of shape ``(out, in)`` lies in bytes. Groups and blocks always run along ``in``.

    Attributes:
        name: the name by which ``get_codec`` finds it.
        bits: true bits per weight, scales included, where ``in`` is a multiple of the codec's group or block.
    """

    @property
    def name(self) -> str:
        """Name of the codec."""
        ...

    @property
    def bits(self) -> float:
        """True bits per weight."""
        ...

    def nbytes(self, shape: Shape) -> int:
        """Bytes of an encoded matrix; FormatError if the codec cannot hold this shape."""
        ...

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Weights of ``shape`` in ``dtype`` from ``raw`` (uint8, 1-D, at any byte offset of its storage).

        The result may share memory with ``raw`` (dense codecs of the same dtype); do not write to it.
        FormatError if ``raw`` has not exactly ``nbytes(shape)`` bytes.
        """
        ...

    def encode(self, weight: Tensor) -> Tensor:
        """Bytes (uint8, 1-D) of a floating ``weight`` ``(out, in)``; FormatError if it cannot be encoded.

        The result may share memory with ``weight`` (dense codecs of the same dtype).
        """
        ...

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """Bytes of the rows ``start:stop`` as a matrix of their own: a view where rows are contiguous."""
        ...


def check_shape(name: str, shape: Sequence[int], block: int = 1) -> Shape:
    """Refuse what is not ``(out, in)`` with positive sizes and whole blocks along ``in``."""
    if len(shape) != 2 or min(shape) < 1:
        raise FormatError(f"{name}: a matrix needs two positive sizes (out, in), got {tuple(shape)}")
    if shape[1] % block:
        raise FormatError(
            f"{name}: blocks of {block} along in, but in is {shape[1]}; choose a codec with a smaller block"
        )
    return shape[0], shape[1]


def check_raw(name: str, raw: Tensor, shape: Shape, nbytes: int) -> Tensor:
    """Refuse ``raw`` unless it is exactly the bytes of an encoded matrix of ``shape``."""
    if raw.dtype != torch.uint8 or raw.dim() != 1:
        got = f"{raw.dtype} {tuple(raw.shape)}"
        raise FormatError(f"{name}: encoded bytes must be uint8 in one dimension, got {got}")
    if raw.numel() != nbytes:
        raise FormatError(
            f"{name}: a matrix {tuple(shape)} takes {nbytes} bytes, got {raw.numel()}; "
            "the file is truncated or its shape or codec is wrong"
        )
    return raw.contiguous()


def check_weight(name: str, weight: Tensor) -> Shape:
    """Shape of ``weight``; refuse to encode what is not a floating matrix."""
    if not weight.is_floating_point():
        raise FormatError(f"{name}: only floating weights can be encoded, got {weight.dtype}")
    return check_shape(name, weight.shape)


def check_rows(name: str, shape: Shape, start: int, stop: int) -> None:
    """Refuse a row range outside of the matrix."""
    if not 0 <= start < stop <= shape[0]:
        raise FormatError(f"{name}: rows {start}:{stop} are not a part of a matrix of {shape[0]} rows")


def view_as(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes seen as ``dtype``: without a copy unless they start off its alignment."""
    if raw.storage_offset() % dtype.itemsize or raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)
