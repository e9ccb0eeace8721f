"""Quantized matrices into tiles without a change: the same codes and scales in another order.

What decodes to the same fp32 weights, bit for bit, has a tile form: ``int{b}g{n}``, ``mxfp4``, and the ggml
blocks ``Q4_0``, ``Q8_0`` and ``MXFP4``. The others have not: their scales are of another kind (``Q4_1`` adds
an fp16 minimum, the K types scale their scales).

Shapes: O rows, I columns, G groups of a row, N blocks of the whole matrix, B bytes of a block.
"""

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats.bitstream import planes, unpack
from gangline.formats.codec import CHUNK, Shape, check_raw
from gangline.formats.ggml_blocks import bytes_of
from gangline.formats.grouped import GroupedCodec
from gangline.formats.mx import BLOCK, MXFP4Codec
from gangline.formats.registry import get_codec
from gangline.formats.tile_layout import ROWS
from gangline.formats.tiled import TiledCodec

_GGML = {"ggml:Q4_0": "tile16:int4g32", "ggml:Q8_0": "tile16:int8g32", "ggml:MXFP4": "tile16:mxfp4"}
_NEGATIVE_ZERO = 8


def tile_form(codec: str) -> str | None:
    """Name of the tile codec that holds what ``codec`` holds, exactly; None if there is none."""
    if codec in _GGML:
        return _GGML[codec]
    return f"tile16:{codec}" if isinstance(get_codec(codec), GroupedCodec | MXFP4Codec) else None


def retile(raw: Tensor, shape: Shape, codec: str) -> tuple[str, Tensor] | None:
    """Tile codec and bytes (uint8, 1-D) of an encoded matrix ``(out, in)``, or None if there is no tile form.

    Both decode to the same weights, bit for bit.

    Raises:
        FormatError: ``raw`` is not a matrix of ``shape`` in ``codec``, or (``ggml:MXFP4``) has an exponent
            that no tile can hold.
    """
    name = tile_form(codec)
    if name is None:
        return None
    source, target = get_codec(codec), get_codec(name)
    assert isinstance(target, TiledCodec)
    raw = check_raw(codec, raw, shape, source.nbytes(shape))
    out = torch.empty(target.nbytes(shape), dtype=torch.uint8, device=raw.device)
    step = max(1, CHUNK // (ROWS * shape[1])) * ROWS
    block_bytes = target.layout.block_bytes(shape[1])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        part = source.slice_rows(raw, shape, start, stop)
        tiles = target.assemble(*_codes_and_scales(part, (stop - start, shape[1]), codec))
        first = start // ROWS * block_bytes
        out[first : first + tiles.numel()] = tiles
    return name, out


def _codes_and_scales(raw: Tensor, shape: Shape, codec: str) -> tuple[Tensor, Tensor]:
    """Unsigned codes ``(O, I)`` and scales ``(O, G)`` as tiles have them."""
    source = get_codec(codec)
    if isinstance(source, GroupedCodec):
        packed_OB, scales_OG = source.parts(raw, shape)
        return unpack(packed_OB, shape[1], source.width), scales_OG
    if isinstance(source, MXFP4Codec):
        codes_NB, exponents_N = source.parts(raw, shape)
        return unpack(codes_NB.reshape(shape[0], -1), shape[1], 4), exponents_N.view(shape[0], -1)
    blocks_NB = raw.view(shape[0] * shape[1] // BLOCK, -1)
    if codec == "ggml:MXFP4":
        exponents_N = blocks_NB[:, 0]
        if bool((exponents_N == 255).any()):
            raise FormatError(
                "ggml:MXFP4: a block has the exponent 255, which is nan in tiles; keep this matrix as stored"
            )
        codes_NL = planes(bytes_of(blocks_NB, 1, 17), 16, 4)
        # ggml has no negative zero.
        codes_NL = codes_NL.masked_fill_(codes_NL == _NEGATIVE_ZERO, 0)
        return codes_NL.view(shape), exponents_N.reshape(shape[0], -1)
    scales_N = bytes_of(blocks_NB, 0, 2).view(torch.float16)
    body_NB = bytes_of(blocks_NB, 2, blocks_NB.shape[1])
    # Signed bytes become unsigned ones with 128 for zero.
    codes_NL = body_NB ^ 0x80 if codec == "ggml:Q8_0" else planes(body_NB, 16, 4)
    return codes_NL.view(shape), scales_N.view(shape[0], -1)
