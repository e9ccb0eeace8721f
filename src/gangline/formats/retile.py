"""Quantized matrices into tiles without a change: the same codes and scales in another order.

What decodes to the same fp32 weights, bit for bit, has a tile form: ``int{b}g{n}``, ``mxfp4``, ``samoyeds:``,
and the ggml blocks ``Q4_0``, ``Q8_0`` and ``MXFP4``. The others have not: their scales are of another kind
(``Q4_1`` adds an fp16 minimum, the K types scale their scales).

Shapes: O rows, I columns, G groups of a row, N blocks of the whole matrix, B bytes of a block, Q quads (four
neighbouring columns), W 32-bit words, R row blocks of S = 16 rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from gangline.core.errors import FormatError
from gangline.formats.bitstream import unpack
from gangline.formats.codec import CHUNK, Shape, check_raw
from gangline.formats.ggml_blocks import bytes_of
from gangline.formats.grouped import GroupedCodec
from gangline.formats.mx import BLOCK, MXFP4Codec
from gangline.formats.registry import get_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.formats.tile_layout import ROWS, TileParts, row_blocks
from gangline.formats.tiled import TiledCodec

_GGML = {"ggml:Q4_0": "tile16:int4g32", "ggml:Q8_0": "tile16:int8g32", "ggml:MXFP4": "tile16:mxfp4"}
# Masks of int32: the low nibble of every byte; of every nibble its third bit, and all but its last.
_NIBBLES = 0x0F0F0F0F
_LAST_MAGNITUDE_BITS = 0x44444444
_MAGNITUDES = 0x77777777


def tile_form(codec: str) -> str | None:
    """Name of the tile codec that holds what ``codec`` holds, exactly; None if there is none."""
    if codec in _GGML:
        return _GGML[codec]
    if codec.startswith("samoyeds:"):
        return codec.replace(":", "16:", 1)
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
    if isinstance(source, SparseCodec) and isinstance(target, SparseCodec):
        return name, target.write(source.read(raw, shape), shape)
    assert isinstance(target, TiledCodec)
    raw = check_raw(codec, raw, shape, source.nbytes(shape))
    out = torch.zeros(target.nbytes(shape), dtype=torch.uint8, device=raw.device)
    block_bytes = target.layout.block_bytes(shape[1])
    step = max(1, 4 * CHUNK // (ROWS * shape[1])) * ROWS
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        part = source.slice_rows(raw, shape, start, stop)
        tiles = out[start // ROWS * block_bytes : row_blocks(stop) * block_bytes]
        _retile_rows(part, (stop - start, shape[1]), codec, tiles, target)
    return name, out


def _retile_rows(raw: Tensor, shape: Shape, codec: str, out: Tensor, target: TiledCodec) -> None:
    source = get_codec(codec)
    if isinstance(source, GroupedCodec):
        packed_OB, scales_OG = source.parts(raw, shape)
        target.assemble(unpack(packed_OB, shape[1], source.width), scales_OG, out=out)
    elif isinstance(source, MXFP4Codec):
        pairs_NB, exponents_N = source.parts(raw, shape)
        words_NW = _words_of_neighbours(bytes_of(pairs_NB, 0, 16).view(torch.int32))
        _store_words(words_NW, exponents_N, shape, out, target)
    elif codec == "ggml:Q8_0":
        blocks_NB = raw.view(shape[0] * shape[1] // BLOCK, -1)
        # Signed bytes become unsigned ones with 128 for zero.
        codes_OI = (blocks_NB[:, 2:] ^ 0x80).view(shape)
        scales_OG = bytes_of(blocks_NB, 0, 2).view(torch.float16).view(shape[0], -1)
        target.assemble(codes_OI, scales_OG, out=out)
    else:
        _retile_halves(raw.view(shape[0] * shape[1] // BLOCK, -1), shape, codec, out, target)


def _retile_halves(blocks_NB: Tensor, shape: Shape, codec: str, out: Tensor, target: TiledCodec) -> None:
    """``Q4_0`` and ``MXFP4`` of ggml, whose low nibbles are the first half of a block."""
    head = blocks_NB.shape[1] - 16
    words_NW = bytes_of(blocks_NB, head, head + 16).view(torch.int32)
    scales_N = bytes_of(blocks_NB, 0, head).view(target.layout.scale).view(-1)
    if codec == "ggml:MXFP4":
        if bool((scales_N == 255).any()):
            raise FormatError(
                "ggml:MXFP4: a block has the exponent 255, which is nan in tiles; keep this matrix as stored"
            )
        words_NW = _without_negative_zero(words_NW)
    quads_NQ = torch.cat([words_NW & _NIBBLES, (words_NW >> 4) & _NIBBLES], dim=1)
    _store_words(quads_NQ[:, ::2] | (quads_NQ[:, 1::2] << 4), scales_N, shape, out, target)


def _words_of_neighbours(x: Tensor) -> Tensor:
    """Words of two quads each, from eight neighbouring nibbles each, the first lowest."""
    quads = []
    for quad in (x & 0xFFFF, (x >> 16) & 0xFFFF):
        quad = (quad | (quad << 8)) & 0x00FF00FF
        quads.append((quad | (quad << 4)) & _NIBBLES)
    return quads[0] | (quads[1] << 4)


def _without_negative_zero(nibbles: Tensor) -> Tensor:
    """E2M1 codes whose zeros have lost their sign, which ggml does not know."""
    magnitude = (nibbles | (nibbles << 1) | (nibbles << 2)) & _LAST_MAGNITUDE_BITS
    return nibbles & (_MAGNITUDES | (magnitude << 1))


def _store_words(words_NW: Tensor, scales_N: Tensor, shape: Shape, out: Tensor, target: TiledCodec) -> None:
    """Write blocks of 32 weights: 4-bit codes as the words of a row, and scales."""
    fill, blocks = -shape[0] % ROWS, row_blocks(shape[0])
    words_OW, scales_OG = words_NW.view(shape[0], -1), scales_N.view(shape[0], -1)
    words_RSW = pad(words_OW, (0, 0, 0, fill)).view(blocks, ROWS, -1)
    scales_RSG = pad(scales_OG, (0, 0, 0, fill)).view(blocks, ROWS, -1)
    parts = TileParts(scales_RSG.transpose(1, 2), None, words_RSW.transpose(1, 2).reshape(blocks, -1))
    target.layout.write(target.row_blocks(out, shape), shape[1], parts)
