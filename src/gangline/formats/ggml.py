"""ggml block types as codecs, ``ggml:{TYPE}``: the bytes of a GGUF tensor, row after row.

Decoding is ours and needs nothing. Encoding calls the ``gguf`` package, for the types that it can encode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats import ggml_blocks, ggml_super
from gangline.formats.codec import CHUNK, Codec, Shape, check_raw, check_rows, check_shape, check_weight
from gangline.formats.dense import DenseCodec

LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class GgmlCodec:
    """Blocks of ``block`` weights along ``in`` in ``size`` bytes each.

    Attributes:
        type_name: ggml's name of the type.
        block: weights of a block.
        size: bytes of a block.
        decode_blocks: writes the weights of blocks ``(N, size)`` into a tensor ``(N, block)``.
        encodes: whether the ``gguf`` package can encode the type.
    """

    type_name: str
    block: int
    size: int
    decode_blocks: Callable[[Tensor, Tensor], None]
    encodes: bool = True

    @property
    def name(self) -> str:
        """For example ``ggml:Q4_0``."""
        return f"ggml:{self.type_name}"

    @property
    def bits(self) -> float:
        """Bits of a block per weight."""
        return 8 * self.size / self.block

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all blocks."""
        rows, columns = check_shape(self.name, shape, self.block)
        return rows * columns // self.block * self.size

    def decode(self, raw: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See ``Codec.decode``; computed in fp32 as ggml does, rounded once to ``dtype``."""
        blocks_NB = check_raw(self.name, raw, shape, self.nbytes(shape)).view(-1, self.size)
        out_NL = torch.empty(len(blocks_NB), self.block, dtype=dtype, device=raw.device)
        step = CHUNK // self.block
        for start in range(0, len(blocks_NB), step):
            self.decode_blocks(blocks_NB[start : start + step], out_NL[start : start + step])
        return out_NL.view(shape)

    def encode(self, weight: Tensor) -> Tensor:
        """See ``Codec.encode``; FormatError if the ``gguf`` package is missing or cannot encode the type."""
        shape = check_weight(self.name, weight)
        self.nbytes(shape)
        if not self.encodes:
            able = ", ".join(codec.name for codec in ggml_codecs() if getattr(codec, "encodes", True))
            raise FormatError(f"{self.name} can only be decoded here; to encode, choose one of {able}")
        values = weight.detach().to("cpu", torch.float32).contiguous()
        peak = float(values.abs().max())
        if not peak <= LARGEST_HALF:
            raise FormatError(
                f"{self.name}: the largest weight is {peak:g}, but blocks hold finite ones up to "
                f"{LARGEST_HALF:g}; repair the checkpoint or keep this matrix in fp32"
            )
        gguf = _gguf()
        encoded = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[self.type_name])
        return torch.from_numpy(encoded).view(-1).to(weight.device)

    def slice_rows(self, raw: Tensor, shape: Shape, start: int, stop: int) -> Tensor:
        """See ``Codec.slice_rows``; always a view."""
        check_rows(self.name, shape, start, stop)
        raw = check_raw(self.name, raw, shape, self.nbytes(shape))
        row = shape[1] // self.block * self.size
        return raw[start * row : stop * row]


def ggml_codecs() -> list[Codec]:
    """Every ggml type that we decode."""
    return [
        DenseCodec("ggml:F32", torch.float32),
        DenseCodec("ggml:F16", torch.float16),
        DenseCodec("ggml:BF16", torch.bfloat16),
        GgmlCodec("Q4_0", 32, 18, ggml_blocks.decode_q4_0),
        GgmlCodec("Q4_1", 32, 20, ggml_blocks.decode_q4_1),
        GgmlCodec("Q5_0", 32, 22, ggml_blocks.decode_q5_0),
        GgmlCodec("Q5_1", 32, 24, ggml_blocks.decode_q5_1),
        GgmlCodec("Q8_0", 32, 34, ggml_blocks.decode_q8_0),
        GgmlCodec("Q2_K", 256, 84, ggml_super.decode_q2_k, encodes=False),
        GgmlCodec("Q3_K", 256, 110, ggml_super.decode_q3_k, encodes=False),
        GgmlCodec("Q4_K", 256, 144, ggml_super.decode_q4_k, encodes=False),
        GgmlCodec("Q5_K", 256, 176, ggml_super.decode_q5_k, encodes=False),
        GgmlCodec("Q6_K", 256, 210, ggml_super.decode_q6_k, encodes=False),
        GgmlCodec("MXFP4", 32, 17, ggml_blocks.decode_mxfp4),
    ]


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise FormatError(
            "encoding ggml blocks needs the gguf package: pip install 'gangline[gguf]'"
        ) from error
    return gguf
