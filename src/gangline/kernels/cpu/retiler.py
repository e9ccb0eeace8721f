"""ggml blocks to tiles in native code: the bytes that ``formats.retile`` makes, at the speed of memory."""

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats import get_codec
from gangline.formats import retile as torch_retile
from gangline.formats.codec import Shape, check_raw
from gangline.formats.tile_layout import ROWS
from gangline.kernels.cpu import huge_pages, native

_NATIVE = ("ggml:Q4_0", "ggml:Q8_0", "ggml:MXFP4")
# Tiles are read fastest where they begin on a cache line.
LINE = 64


def retile(raw: Tensor, shape: Shape, codec: str) -> tuple[str, Tensor] | None:
    """The same as :func:`gangline.formats.retile.retile`, on all threads of the native core where it can.

    Raises:
        FormatError: see there.
    """
    core = native()
    if core is None or codec not in _NATIVE or raw.device.type != "cpu":
        return torch_retile.retile(raw, shape, codec)
    raw = check_raw(codec, raw, shape, get_codec(codec).nbytes(shape)).contiguous()
    name = torch_retile.tile_form(codec)
    assert name is not None
    tiles = huge_pages.empty((get_codec(name).nbytes(shape),), torch.uint8)
    if not core.retile(codec, raw.data_ptr(), tiles.data_ptr(), *shape):
        raise _refused(codec)
    return name, tiles


def form_in_place(shape: Shape, codec: str) -> str | None:
    """Name of the tile codec that :func:`retile_in_place` makes of such a matrix, None if it cannot."""
    if native() is None or codec not in _NATIVE or shape[0] % ROWS:
        return None
    name = torch_retile.tile_form(codec)
    assert name is not None
    return name if get_codec(name).nbytes(shape) == get_codec(codec).nbytes(shape) else None


def retile_in_place(raw: Tensor, shape: Shape, codec: str, shift: int = 0) -> Tensor:
    """Turn a matrix into tiles where it lies, and return these: ``shift`` bytes before ``raw``.

    Only where :func:`form_in_place` gives a name. ``raw`` is a part of a larger tensor that has ``shift``
    bytes (below 64) to spare before it. Runs on the calling thread alone, without the interpreter's lock.

    Raises:
        FormatError: ``ggml:MXFP4`` with an exponent that no tile can hold.
    """
    core = native()
    assert core is not None
    tiles = raw.as_strided((raw.numel(),), (1,), raw.storage_offset() - shift)
    if not core.retile_in_place(codec, raw.data_ptr(), tiles.data_ptr(), *shape):
        raise _refused(codec)
    return tiles


def _refused(codec: str) -> FormatError:
    return FormatError(
        f"{codec}: a block has the exponent 255, which is nan in tiles; the file is damaged or of another "
        "kind: download it again"
    )
