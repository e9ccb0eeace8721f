"""The torch reference kernel: what one expert computes, on weights in any codec.

Shape suffixes: T tokens, P (token, expert) pairs, N rows routed to one expert, D hidden, F intermediate, G
columns of the gate/up product (2F or F).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import DenseCodec, get_codec
from gangline.kernels.grouping import Adder


@dataclass(frozen=True)
class ExpertMath:
    """What the experts of one layer compute besides their matrices.

    Attributes:
        apply_gate: maps the gate/up product ``[N, G]``, in the module's own column order, to ``[N, F]``.
        interleaved: whether that order is g0, u0, g1, u1, ... instead of all gates then all ups.
        gate_up_bias_EG: bias of the gate/up product of every expert, in the module's order, or None.
        down_bias_ED: bias of the output of every expert, or None.
        post_norm: applied to each expert's output before weighting, or None.
    """

    apply_gate: Callable[[Tensor], Tensor]
    interleaved: bool = False
    gate_up_bias_EG: Tensor | None = None
    down_bias_ED: Tensor | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None


class Matrix:
    """One weight matrix where it lies. Dense bytes of the wanted dtype become a view; packed ones stay
    packed.
    """

    __slots__ = ("_dense", "_raw", "_spec")

    def __init__(self, spec: FieldSpec, raw: Tensor) -> None:
        self._spec = spec
        self._raw = raw
        codec = get_codec(spec.codec)
        self._dense = codec.decode(raw, spec.shape, codec.stored) if isinstance(codec, DenseCodec) else None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix as ``(out, in)`` in ``dtype``; a view if that is how it is stored."""
        if self._dense is not None:
            w = self._dense if self._dense.dtype == dtype else self._dense.to(dtype)
        else:
            w = get_codec(self._spec.codec).decode(self._raw, self._spec.shape, dtype)
        return w.t() if self._spec.transposed else w


ExpertWeights = tuple[Matrix, ...]


class ReferenceKernel:
    """Computes one expert at a time with torch; the yardstick of every other kernel.

    Rows of one expert are always computed in one product in token order, so that the result does not depend
    on where the weights lie or in which order experts arrive.
    """

    adder: Adder | None = None

    def __init__(self, layout: ExpertLayout, math: ExpertMath) -> None:
        self._fields = layout.fields
        self._math = math
        self._split = len(layout.fields) == 3

    def bind(self, raws: Sequence[Tensor]) -> ExpertWeights:
        """Return the matrices of one expert over its raw bytes (uint8, one per field); copies nothing."""
        return tuple(Matrix(spec, raw) for spec, raw in zip(self._fields, raws, strict=True))

    def __call__(self, x_ND: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
        """Return ``[N, D]``: the output of ``expert`` for its rows, not yet weighted."""
        math = self._math
        h_NG = self._gate_up(x_ND, weights)
        if math.gate_up_bias_EG is not None:
            h_NG = h_NG + math.gate_up_bias_EG[expert].to(h_NG.dtype)
        h_NF = math.apply_gate(h_NG)
        y_ND = linear(h_NF, weights[-1].weight(x_ND.dtype))
        if math.down_bias_ED is not None:
            y_ND = y_ND + math.down_bias_ED[expert].to(y_ND.dtype)
        return y_ND if math.post_norm is None else math.post_norm(y_ND)

    def pairs(
        self,
        x_TD: Tensor,
        token_P: Tensor,
        starts: Sequence[int],
        weights: Sequence[ExpertWeights],
        experts: Sequence[int],
        out_PD: Tensor | None = None,
    ) -> Tensor:
        """Return ``[P, D]`` in fp32: every pair's output, not yet weighted.

        Args:
            x_TD: rows of all tokens.
            token_P: row of each pair; pairs are sorted by expert.
            starts: pairs of the i-th expert are ``starts[i]`` to ``starts[i + 1]``; the first is 0.
            weights: bound weights of the experts.
            experts: their ids, which choose the biases.
            out_PD: where to write, fp32; by default a new tensor.
        """
        y_PD = x_TD.new_empty(len(token_P), x_TD.shape[1], dtype=torch.float32) if out_PD is None else out_PD
        for index, expert in enumerate(experts):
            rows = slice(starts[index], starts[index + 1])
            if rows.start < rows.stop:
                y_PD[rows] = self(x_TD[token_P[rows]], weights[index], expert)
        return y_PD

    def _gate_up(self, x_ND: Tensor, weights: ExpertWeights) -> Tensor:
        if not self._split:
            return linear(x_ND, weights[0].weight(x_ND.dtype))
        gate_NF = linear(x_ND, weights[0].weight(x_ND.dtype))
        up_NF = linear(x_ND, weights[1].weight(x_ND.dtype))
        if self._math.interleaved:
            return torch.stack((gate_NF, up_NF), dim=-1).flatten(-2)
        return torch.cat((gate_NF, up_NF), dim=-1)
