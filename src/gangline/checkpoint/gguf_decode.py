"""Read a tensor of a GGUF file as plain numbers, in pieces, so that packed and unpacked bytes stay few."""

import math

import torch
from torch import Tensor

from gangline.checkpoint.gguf_header import GGUFTensor, require_gguf
from gangline.checkpoint.safetensors_index import read_into
from gangline.core.errors import UnsupportedModelError
from gangline.formats import codec_names, get_codec

_CHUNK_WEIGHTS = 1 << 22  # 16 MiB in fp32


def known_type(kind: str) -> bool:
    """Whether our formats compute on this ggml type as it is stored."""
    return f"ggml:{kind}" in codec_names()


def read_bytes(tensor: GGUFTensor, start: int, nbytes: int) -> Tensor:
    """Return ``nbytes`` packed bytes from ``start`` of a tensor as 1-D uint8, in memory of their own."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    with tensor.file.open("rb", buffering=0) as stream:
        read_into(stream, tensor.offset + start, buffer, tensor.file)
    return buffer


def read_tensor(tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
    """Return a whole tensor in ``dtype``.

    Raises:
        CheckpointError: the file ends inside the tensor.
        UnsupportedModelError: no decoder for its type.
    """
    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape[:-1])
    row_bytes = tensor.nbytes // rows
    out = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = read_bytes(tensor, start * row_bytes, count * row_bytes)
        out[start : start + count] = decode(tensor, raw, (count, columns), dtype)
    return out.view(tensor.shape)


def decode(tensor: GGUFTensor, raw: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return packed bytes of ``tensor`` as numbers: by our codec, or by the gguf package's for other types.

    Raises:
        UnsupportedModelError: neither knows the type.
    """
    if known_type(tensor.type):
        return get_codec(f"ggml:{tensor.type}").decode(raw, shape, dtype)
    gguf = require_gguf()
    try:
        numbers = gguf.quants.dequantize(
            raw.view(shape[0], -1).numpy(), gguf.GGMLQuantizationType[tensor.type]
        )
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{tensor.file}: tensor {tensor.name} is stored as {tensor.type}, for which there is no decoder; "
            "use a file of another type, for example Q4_K_M"
        ) from error
    return torch.from_numpy(numbers).view(shape).to(dtype)
