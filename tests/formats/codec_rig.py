"""Random encoded matrices of every codec, and a slow, independent decoder of the grouped integers."""

import numpy as np
import torch
from torch import Tensor

from gangline.formats import codec_names, get_codec

# Where the fp16 fields of a ggml block lie: random bytes there could be nan.
HALF_FIELDS = {
    "ggml:Q4_0": (0,),
    "ggml:Q4_1": (0, 2),
    "ggml:Q5_0": (0,),
    "ggml:Q5_1": (0, 2),
    "ggml:Q8_0": (0,),
    "ggml:Q2_K": (80, 82),
    "ggml:Q3_K": (108,),
    "ggml:Q4_K": (0, 2),
    "ggml:Q5_K": (0, 2),
    "ggml:Q6_K": (208,),
    "ggml:MXFP4": (),
}
DENSE = ("bf16", "fp16", "fp32", "ggml:F32", "ggml:F16", "ggml:BF16")
GROUPED = tuple(name for name in codec_names() if name.startswith("int"))
BLOCKS = tuple(HALF_FIELDS)
TILED = tuple(name for name in codec_names() if name.startswith("tile16:"))
ALL = codec_names()


def width_and_group(name: str) -> tuple[int, int]:
    """``int4g32`` as (4, 32)."""
    width, group = name.removeprefix("int").split("g")
    return int(width), int(group)


def random_raw(name: str, shape: tuple[int, int]) -> Tensor:
    """Random bytes of a matrix without nan: every code may occur."""
    codec = get_codec(name)
    if name in DENSE:
        return codec.encode(torch.randn(shape))
    raw = torch.randint(0, 256, (codec.nbytes(shape),), dtype=torch.uint8)
    if name in BLOCKS:
        blocks = raw.view(-1, codec.size)
        for start in HALF_FIELDS[name]:
            fields = (torch.randn(len(blocks), 1) / 8).half()
            blocks[:, start : start + 2] = fields.view(torch.uint8)
        if name == "ggml:MXFP4":
            blocks[:, 0] = torch.randint(100, 140, (len(blocks),))
        return raw
    if name == "mxfp4":
        scales = raw[shape[0] * shape[1] // 2 :]
        scales.copy_(torch.randint(100, 140, scales.shape))
        return raw
    if name in TILED:
        raw_RB = codec.row_blocks(raw, shape)
        parts = codec.layout.read(raw_RB, shape[1])
        scales = parts.scales_RGS
        mx = name == "tile16:mxfp4"
        if parts.row_scales_RS is not None:
            parts.row_scales_RS.copy_(torch.randn(parts.row_scales_RS.shape) / 1000)
        else:
            scales.copy_(torch.randint(100, 140, scales.shape) if mx else torch.randn(scales.shape) / 8)
        if parts.zeros_RGS is not None:
            parts.zeros_RGS.bitwise_and_(2**codec.layout.width - 1)
        codec.layout.write(raw_RB, shape[1], parts)
        return raw
    _, group = width_and_group(name)
    scales = (torch.rand(shape[0], -(-shape[1] // group)) + 0.01).half()
    raw[raw.numel() - 2 * scales.numel() :] = scales.view(torch.uint8).view(-1)
    return raw


def slow_parts(name: str, raw: Tensor, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes (out, in) and the scale of every weight (out, in) of a grouped matrix, bit by bit."""
    width, group = width_and_group(name)
    rows, columns = shape
    row_bytes = -(-columns * width // 32) * 4
    data = raw.numpy().tobytes()
    codes = np.zeros(shape, dtype=np.int64)
    for row in range(rows):
        stream = int.from_bytes(data[row * row_bytes : (row + 1) * row_bytes], "little")
        for column in range(columns):
            codes[row, column] = (stream >> (column * width)) % 2**width - 2 ** (width - 1)
    scales = np.frombuffer(data[rows * row_bytes :], dtype="<f2").reshape(rows, -1)
    return codes, np.repeat(scales, group, axis=1)[:, :columns]
