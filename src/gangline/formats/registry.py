"""Codecs by name."""

from functools import cache

from gangline.core.errors import FormatError
from gangline.formats.codec import Codec
from gangline.formats.dense import dense_codecs
from gangline.formats.ggml import ggml_codecs
from gangline.formats.grouped import grouped_codecs
from gangline.formats.mx import MXFP4Codec
from gangline.formats.tiled import tiled_codecs


@cache
def _codecs() -> dict[str, Codec]:
    codecs: list[Codec] = [*dense_codecs(), *grouped_codecs(), *ggml_codecs(), MXFP4Codec(), *tiled_codecs()]
    return {codec.name: codec for codec in codecs}


def get_codec(name: str) -> Codec:
    """The codec called ``name``; FormatError lists the known names."""
    codecs = _codecs()
    if name not in codecs:
        raise FormatError(f"unknown codec {name!r}; known: {', '.join(codecs)}")
    return codecs[name]


def codec_names() -> tuple[str, ...]:
    """Every known name."""
    return tuple(_codecs())
