"""How one expert's matrices lie in bytes: encode, decode, slice, count bytes."""

from gangline.formats.codec import Codec, Shape
from gangline.formats.dense import DenseCodec, dense_codec_name
from gangline.formats.qtensor import QTensor
from gangline.formats.registry import codec_names, get_codec

__all__ = ["Codec", "DenseCodec", "QTensor", "Shape", "codec_names", "dense_codec_name", "get_codec"]
