"""Experts from the codec of their checkpoint to the codec of a pack.

A codec's name asks for that codec, whatever the source has. The word ``tiled`` asks for the order in which
the native kernels read, without a change of any weight: quantized matrices go to the tile codec that holds
exactly the same, plain ones that are stored ``(in, out)`` are turned, and the others stay as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import DenseCodec, get_codec
from gangline.formats.retile import tile_form
from gangline.kernels.cpu.encoder import encode
from gangline.kernels.cpu.retiler import retile

TILED = "tiled"


def recode_layout(layout: ExpertLayout, codec: str | None) -> ExpertLayout:
    """The layout that a pack gives to experts of ``layout``.

    Args:
        layout: the source's.
        codec: a codec's name, ``tiled``, or None for the source's own bytes.

    Raises:
        FormatError: there is no such codec, or it cannot hold a matrix.
    """
    return ExpertLayout(tuple(_recode_spec(field, codec) for field in layout.fields))


def recode(raw: Tensor, old: FieldSpec, new: FieldSpec) -> Tensor:
    """The bytes of one matrix in the place that :func:`recode_layout` has given it.

    Raises:
        FormatError: the codec cannot hold a weight.
    """
    if old == new:
        return raw.contiguous()
    if not old.transposed and new.codec == tile_form(old.codec):
        tiles = retile(raw, old.shape, old.codec)
        assert tiles is not None
        return tiles[1]
    source = get_codec(old.codec)
    dtype = source.stored if isinstance(source, DenseCodec) else torch.float32
    weight = source.decode(raw, old.shape, dtype)
    weight = weight.t() if old.transposed else weight
    native = encode(weight, new.codec)
    return native if native is not None else get_codec(new.codec).encode(weight)


def _recode_spec(field: FieldSpec, codec: str | None) -> FieldSpec:
    wanted = _tile_codec(field) if codec == TILED else codec
    if wanted is None or (wanted == field.codec and not field.transposed):
        return field
    shape = (field.shape[1], field.shape[0]) if field.transposed else field.shape
    return replace(field, shape=shape, codec=wanted, nbytes=get_codec(wanted).nbytes(shape), transposed=False)


def _tile_codec(field: FieldSpec) -> str | None:
    """The codec that ``tiled`` means for a field; None to leave it."""
    if isinstance(get_codec(field.codec), DenseCodec):
        return field.codec
    # The groups of a transposed matrix run along its outputs, those of tiles along its inputs.
    return None if field.transposed else tile_form(field.codec)
