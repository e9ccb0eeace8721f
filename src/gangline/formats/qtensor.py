"""One encoded matrix: its bytes, its codec and its logical shape."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.formats.codec import Shape
from gangline.formats.registry import get_codec


@dataclass(frozen=True, eq=False)
class QTensor:
    """A matrix in the bytes of a codec.

    Attributes:
        shape: ``(out, in)``, logical.
        codec: name of the codec.
        raw: the bytes, uint8, one dimension.
    """

    shape: Shape
    codec: str
    raw: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, codec: str) -> "QTensor":
        """Encode a floating matrix ``(out, in)``; FormatError if the codec cannot hold it."""
        raw = get_codec(codec).encode(weight)
        return cls((weight.shape[0], weight.shape[1]), codec, raw)

    @property
    def nbytes(self) -> int:
        """Every byte of the matrix, scales included."""
        return self.raw.numel()

    @property
    def bits(self) -> float:
        """True bits per weight of this very matrix."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights ``(out, in)``; may share memory with ``raw``."""
        return get_codec(self.codec).decode(self.raw, self.shape, dtype)

    def slice_rows(self, start: int, stop: int) -> "QTensor":
        """The rows ``start:stop`` as a matrix of their own."""
        raw = get_codec(self.codec).slice_rows(self.raw, self.shape, start, stop)
        return QTensor((stop - start, self.shape[1]), self.codec, raw)
