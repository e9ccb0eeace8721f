"""Random experts in any codec for tests, and what they must compute.

Shape suffixes: T tokens, K experts per token, P pairs, N pairs of one expert, D hidden, F intermediate, G
gate/up columns, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.formats.samoyeds_arrays import prune_magnitude
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.grouping import Grouping, group_by_expert
from gangline.kernels.reference import ExpertMath, ReferenceKernel


def swiglu(h_NG: Tensor) -> Tensor:
    gate, up = h_NG.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped_oai(h_NG: Tensor) -> Tensor:
    gate, up = h_NG[..., ::2].clamp(max=7.0), h_NG[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def layout_of(
    codec: str, hidden: int, intermediate: int, *, gated: bool = True, split: bool = False
) -> ExpertLayout:
    """Fields of one expert, all in one codec."""
    up = (intermediate, hidden)
    if not gated:
        firsts = [("up", up)]
    elif split:
        firsts = [("gate", up), ("up", up)]
    else:
        firsts = [("gate_up", (2 * intermediate, hidden))]
    fields = [*firsts, ("down", (hidden, intermediate))]
    return ExpertLayout(
        tuple(FieldSpec(name, shape, codec, get_codec(codec).nbytes(shape)) for name, shape in fields)
    )


@dataclass
class Experts:
    """Experts of one layer as bytes, with both kernels bound to them."""

    layout: ExpertLayout
    math: ExpertMath
    raws: list[tuple[Tensor, ...]]

    @classmethod
    def random(cls, layout: ExpertLayout, math: ExpertMath, experts: int) -> "Experts":
        raws = [tuple(random_matrix(f) for f in layout.fields) for _ in range(experts)]
        return cls(layout, math, raws)

    def native(self, x_TD: Tensor, grouping: Grouping) -> Tensor:
        return run(NativeKernel(self.layout, self.math), self.raws, x_TD, grouping)

    def reference(self, x_TD: Tensor, grouping: Grouping) -> Tensor:
        return run(ReferenceKernel(self.layout, self.math), self.raws, x_TD.float(), grouping)


def random_matrix(spec: FieldSpec) -> Tensor:
    """Bytes of random weights, pruned where the codec wants a pattern of zeros."""
    codec = get_codec(spec.codec)
    weight_OI = torch.randn(spec.shape) / spec.shape[1] ** 0.5
    return codec.encode(
        prune_magnitude(weight_OI, codec.pattern) if isinstance(codec, SparseCodec) else weight_OI
    )


def run(
    kernel: NativeKernel | ReferenceKernel, raws: list[tuple[Tensor, ...]], x_TD: Tensor, grouping: Grouping
) -> Tensor:
    weights = [kernel.bind(raws[e]) for e in grouping.experts]
    return kernel.pairs(x_TD, grouping.token_P, grouping.starts, weights, grouping.experts)


def routed(tokens: int, experts: int, top_k: int, used: int | None = None) -> Grouping:
    """Random routing of ``tokens`` to the first ``used`` experts."""
    used = used or experts
    ids_TK = torch.rand(tokens, used).argsort(dim=-1)[:, :top_k]
    return group_by_expert(ids_TK, torch.rand(tokens, top_k), experts)


def biases(experts: int, columns: int, hidden: int) -> dict[str, Tensor]:
    return {
        "gate_up_bias_EG": torch.randn(experts, columns),
        "down_bias_ED": torch.randn(experts, hidden),
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    if want.numel() == 0:
        return 0.0
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


Gate = Callable[[Tensor], Tensor]
