"""Matrices stored as plain little-endian floating numbers, row after row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats.codec import Shape, check_raw, check_rows, check_shape, check_weight, view_as

DENSE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class DenseCodec:
    """Plain numbers of ``stored``; decoding to that dtype is a view of the bytes."""

    name: str
    stored: torch.dtype

    @property
    def bits(self) -> float:
        """Bits of one number."""
        return 8.0 * self.stored.itemsize

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the matrix."""
        rows, columns = check_shape(self.name, shape)
        return rows * columns * self.stored.itemsize

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See ``Codec.decode``."""
        raw = check_raw(self.name, raw, shape, self.nbytes(shape))
        return view_as(raw, self.stored).view(shape).to(dtype)

    def encode(self, weight: Tensor) -> Tensor:
        """See ``Codec.encode``; rounds to nearest even if ``weight`` is wider."""
        check_weight(self.name, weight)
        return weight.detach().to(self.stored).contiguous().view(-1).view(torch.uint8)

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """See ``Codec.slice_rows``; always a view."""
        check_rows(self.name, shape, start, stop)
        raw = check_raw(self.name, raw, shape, self.nbytes(shape))
        row = shape[1] * self.stored.itemsize
        return raw[start * row : stop * row]


def dense_codec_name(dtype: torch.dtype) -> str:
    """Name of the codec that stores ``dtype`` as it is: ``bf16``, ``fp16`` or ``fp32``."""
    if dtype not in DENSE_NAMES:
        known = ", ".join(str(known) for known in DENSE_NAMES)
        raise FormatError(f"no dense codec stores {dtype}; convert the weights to one of {known}")
    return DENSE_NAMES[dtype]


def dense_codecs() -> list[DenseCodec]:
    """The dense codecs under their own names."""
    return [DenseCodec(name, dtype) for dtype, name in DENSE_NAMES.items()]
