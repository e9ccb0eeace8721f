"""Random experts in Samoyeds codecs and what they must compute, from the format's own decoder.

Shape suffixes: T tokens, K experts per token, P pairs, D hidden, F intermediate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats.registry import sparse_codec
from gangline.formats.samoyeds_arrays import prune_magnitude


def encoded(codec: str, shape: tuple[int, int], *, whole: bool = False) -> Tensor:
    """Bytes of a random matrix; of whole numbers -4 ... 4 if asked."""
    weight = torch.randint(-4, 5, shape).float() if whole else torch.randn(shape) / shape[1] ** 0.5
    found = sparse_codec(codec)
    return found.encode(prune_magnitude(weight.to(torch.bfloat16), found.pattern))


def decoded(codec: str, raw: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix in fp32."""
    return sparse_codec(codec).decode(raw, shape, torch.float32)


def field(name: str, shape: tuple[int, int], codec: str) -> FieldSpec:
    return FieldSpec(name, shape, codec, sparse_codec(codec).nbytes(shape))


@dataclass
class SparseExperts:
    """Experts of one layer.

    Attributes:
        layout: of every expert.
        raws: their bytes.
    """

    layout: ExpertLayout
    raws: list[tuple[Tensor, ...]]

    @classmethod
    def random(
        cls, codec: str, hidden: int, intermediate: int, experts: int, *, split: bool = False
    ) -> "SparseExperts":
        up = (intermediate, hidden)
        firsts = [("gate", up), ("up", up)] if split else [("gate_up", (2 * intermediate, hidden))]
        fields = tuple(field(n, s, codec) for n, s in [*firsts, ("down", (hidden, intermediate))])
        raws = [tuple(encoded(codec, f.shape) for f in fields) for _ in range(experts)]
        return cls(ExpertLayout(fields), raws)

    def on(self, device: torch.device) -> list[tuple[Tensor, ...]]:
        return [tuple(raw.to(device) for raw in raws) for raws in self.raws]

    def rows(self, x_ND: Tensor, expert: int) -> Tensor:
        """One expert in fp32 with the intermediate rounded to bf16, as the kernel stores it."""
        matrices = [
            decoded(f.codec, raw, f.shape)
            for f, raw in zip(self.layout.fields, self.raws[expert], strict=True)
        ]
        gate_up = torch.cat(matrices[:-1])
        gate_NF, up_NF = (x_ND.float() @ gate_up.t()).chunk(2, dim=-1)
        h_NF = (torch.nn.functional.silu(gate_NF) * up_NF).to(torch.bfloat16).float()
        return h_NF @ matrices[-1].t()

    def layer(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum in fp32; ids outside the experts add nothing."""
        out_TD = torch.zeros(x_TD.shape)
        for expert in range(len(self.raws)):
            token_N, slot_N = (ids_TK == expert).nonzero(as_tuple=True)
            y_ND = self.rows(x_TD[token_N], expert)
            out_TD.index_add_(0, token_N, y_ND * weights_TK[token_N, slot_N, None].float())
        return out_TD
