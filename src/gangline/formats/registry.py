"""Codecs by name.

All but the sparse ones are listed. A sparse codec is made from its name, ``samoyeds:N:M:V/VALUES`` or
``samoyeds16:N:M:V/VALUES``: there are too many patterns to list.
"""

from functools import cache

from gangline.core.errors import FormatError
from gangline.formats.codec import Codec
from gangline.formats.dense import dense_codecs
from gangline.formats.ggml import ggml_codecs
from gangline.formats.grouped import grouped_codecs
from gangline.formats.mx import MXFP4Codec
from gangline.formats.samoyeds import SamoyedsCodec, SparseCodec
from gangline.formats.samoyeds_pattern import SparsePattern
from gangline.formats.samoyeds_tiles import SamoyedsTileCodec
from gangline.formats.samoyeds_values import ValueKind
from gangline.formats.tiled import tiled_codecs

_SPARSE: dict[str, type[SparseCodec]] = {"samoyeds:": SamoyedsCodec, "samoyeds16:": SamoyedsTileCodec}


@cache
def _codecs() -> dict[str, Codec]:
    codecs: list[Codec] = [*dense_codecs(), *grouped_codecs(), *ggml_codecs(), MXFP4Codec(), *tiled_codecs()]
    return {codec.name: codec for codec in codecs}


def get_codec(name: str) -> Codec:
    """The codec called ``name``; FormatError lists the known names."""
    codecs = _codecs()
    if name in codecs:
        return codecs[name]
    if name.startswith(tuple(_SPARSE)):
        return sparse_codec(name)
    raise FormatError(f"unknown codec {name!r}; known: {', '.join(codecs)}, samoyeds:N:M:V/VALUES")


@cache
def sparse_codec(name: str) -> SparseCodec:
    """The sparse codec called ``name``; FormatError if it is none or its pattern or values are unknown."""
    kind, _, rest = name.partition(":")
    pattern, _, values = rest.partition("/")
    if f"{kind}:" not in _SPARSE:
        raise FormatError(f"{name!r} is no sparse codec; write samoyeds:N:M:V/VALUES")
    codec = _SPARSE[f"{kind}:"](SparsePattern.parse(pattern), ValueKind.parse(values))
    if codec.name != name:
        raise FormatError(f"unknown codec {name!r}; write {codec.name}")
    return codec


def codec_names() -> tuple[str, ...]:
    """Every known name but those of sparse codecs."""
    return tuple(_codecs())
