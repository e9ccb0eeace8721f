"""Plain weights to tiles in native code: the bytes that the torch codecs make, in a fraction of the time."""

import torch
from torch import Tensor

from gangline.formats import get_codec
from gangline.formats.codec import check_weight
from gangline.kernels.cpu import huge_pages, native

_NUMBERS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def encode(weight: Tensor, codec: str) -> Tensor | None:
    """Return the bytes of a matrix ``(out, in)`` in a ``tile16:`` codec (uint8, 1-D), bit for bit those of
    ``get_codec(codec).encode(weight)``.

    A transposed view is read where it lies.

    Returns:
        The bytes, or None where only the codec itself can answer: there is no native core, it does not know
        the codec or the dtype, or the codec cannot hold a weight.

    Raises:
        FormatError: ``weight`` is no matrix.
    """
    core = native()
    number = _NUMBERS.get(weight.dtype)
    if core is None or number is None or weight.device.type != "cpu" or not codec.startswith("tile16:"):
        return None
    rows, columns = check_weight(codec, weight)
    raw = huge_pages.empty((get_codec(codec).nbytes((rows, columns)),), torch.uint8)
    if 1 not in weight.stride():
        weight = weight.clone(memory_format=torch.contiguous_format)
    tiles = core.Matrix(raw.data_ptr(), rows, columns, codec)
    held = core.encode(tiles, weight.data_ptr(), number, *weight.stride())
    return raw if held else None
