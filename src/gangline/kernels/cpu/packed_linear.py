"""A linear layer on packed weights: attention projections, shared experts and the output head.

Shape suffixes: T tokens, O out features, I in features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gangline.formats import get_codec
from gangline.kernels.cpu import native

_NATIVE_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with ``W`` in the bytes of a codec.

    With the native core, ``x`` is rounded to int8 in the codec's groups and multiplied with the packed
    weights where they lie; without it, ``W`` is decoded for every call.

    Attributes:
        raw: encoded weights, uint8, one dimension.
        codec: name of their codec.
        bias: ``[O]`` in fp32, or None.
        matrix: the native core's view of ``raw``, or None.
    """

    raw: Tensor
    bias: Tensor | None

    def __init__(
        self, raw: Tensor, codec: str, in_features: int, out_features: int, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.codec = in_features, out_features, codec
        self.register_buffer("raw", raw, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        core = native()
        self.matrix: Any = None
        if core is not None and codec in core.native_formats():
            self.matrix = core.Matrix(raw.data_ptr(), out_features, in_features, codec)

    @property
    def weight(self) -> Tensor:
        """The weights ``[O, I]`` in fp32, decoded; some models read ``weight.dtype`` or its device."""
        return get_codec(self.codec).decode(self.raw, (self.out_features, self.in_features), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., O]`` in the dtype of ``x`` ``[..., I]``."""
        if self.matrix is None or x.dtype not in _NATIVE_DTYPES:
            weight_OI = get_codec(self.codec).decode(self.raw, (self.out_features, self.in_features), x.dtype)
            return linear(x, weight_OI, None if self.bias is None else self.bias.to(x.dtype))
        x_TI = x.reshape(-1, self.in_features).contiguous()
        y_TO = torch.empty(len(x_TI), self.out_features, dtype=x.dtype)
        kind = _NATIVE_DTYPES[x.dtype]
        bias = 0 if self.bias is None else self.bias.data_ptr()
        core = native()
        assert core is not None
        core.linear(self.matrix, x_TI.data_ptr(), kind, len(x_TI), y_TO.data_ptr(), kind, bias)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and codec."""
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={self.codec}"
