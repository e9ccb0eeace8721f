"""Experts in Samoyeds codecs on sparse tensor cores: gate, up and activation in one kernel, down in a second.

Tokens are read in place through their numbers, for all experts in one launch; nothing waits for the host. The
outputs of a token's experts are added in fp32 and ascending expert id, so that a result does not depend on
the order of work.

Source: Samoyeds, arXiv 2503.10725; what differs is said in ``csrc/cuda/ssmm.cu``.

Shape suffixes: T tokens, K experts per token, P pairs sorted by expert, D hidden, F intermediate, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.core.layout import ExpertLayout
from gangline.formats import get_codec
from gangline.kernels.cpu.gates import GateForm, recognise_gate
from gangline.kernels.cuda.compiler import KernelBuild
from gangline.kernels.cuda.launcher import Launch, Launcher
from gangline.kernels.cuda.routing import DeviceRouting, route_few, route_on_device
from gangline.kernels.cuda.samoyeds_matrices import Addresses, PartShape, address_table, cannot_split
from gangline.kernels.cuda.samoyeds_product import SUM_THREADS, SparseProduct
from gangline.kernels.cuda.samoyeds_wgmma import WideProduct, unsupported_wide
from gangline.kernels.cuda.tiles import Tile, choose_tile, unsupported_codec
from gangline.kernels.reference import ExpertMath

_COMBINE = KernelBuild("combine.cu", "gangline_combine")


@dataclass(eq=False, frozen=True)
class SamoyedsWeights:
    """One expert where it lies.

    Attributes:
        first: addresses of gate and up.
        down: addresses of the down matrix.
        raws: the bytes; kept alive with the addresses.
    """

    first: tuple[Addresses, Addresses]
    down: Addresses
    raws: tuple[Tensor, ...]


@dataclass(eq=False, frozen=True)
class ExpertTable:
    """Addresses of several experts on the device, in the order in which ``starts`` counts them.

    Tensor maps are there only where the Hopper kernel can serve.
    """

    first_E24: Tensor
    down_E24: Tensor
    weights: tuple[SamoyedsWeights, ...]
    first_maps_E2B: Tensor | None = None
    down_maps_E2B: Tensor | None = None


class SamoyedsKernel:
    """Computes experts whose matrices are all in ``samoyeds:`` codecs, from bf16 activations.

    Attributes:
        first: gate, up and activation.
        down: the down projection.
        wide: both by the Hopper kernel; None where it cannot serve.
    """

    def __init__(self, layout: ExpertLayout, expert_math: ExpertMath, launcher: Launcher) -> None:
        """Raise FormatError, with the reason, where ``supports`` gives one."""
        reason = self.supports(layout, expert_math)
        if reason is not None:
            raise FormatError(f"there is no GPU kernel for these experts: {reason}; use ReferenceKernel")
        self._layout = layout
        self._launcher = launcher
        parts = 2 if len(layout.fields) == 2 else 1
        gate = _gate(layout, expert_math)
        self.first = SparseProduct(PartShape.of(layout.fields[0], parts), launcher, gate)
        self.down = SparseProduct(PartShape.of(layout.fields[-1]), launcher)
        products = (WideProduct(self.first.shape, launcher, gate), WideProduct(self.down.shape, launcher))
        reasons = [unsupported_wide(product.shape.codec, launcher.arch) for product in products]
        self.wide = products if reasons == [None, None] else None

    @staticmethod
    def supports(layout: ExpertLayout, expert_math: ExpertMath) -> str | None:
        """Return why there is no kernel for such experts, or None if there is one."""
        for spec in layout.fields:
            reason = unsupported_codec(get_codec(spec.codec))
            if reason is not None:
                return f"{spec.name} ({spec.codec}): {reason}"
            if spec.transposed:
                return f"{spec.name} is stored as (in, out)"
            if spec.shape[1] % 8 or spec.shape[0] % 8:
                return f"{spec.name} has sizes {spec.shape}; they must be multiples of 8"
        if len({spec.codec for spec in layout.fields[:-1]}) > 1:
            return "gate and up are in different codecs"
        if len(layout.fields) == 2:
            reason = cannot_split(layout.fields[0])
            if reason is not None:
                return reason
        if expert_math.interleaved:
            return "columns of gate and up alternate"
        if expert_math.gate_up_bias_EG is not None or expert_math.down_bias_ED is not None:
            return "the experts have biases"
        if expert_math.post_norm is not None:
            return "a norm follows the experts"
        if _gate(layout, expert_math) is None:
            return "the gate is none of the formulas that the kernel knows"
        return None

    def bind(self, raws: Sequence[Tensor]) -> SamoyedsWeights:
        """Return one expert over its raw bytes (uint8, one per field, on the device); copies nothing."""
        rows = self._layout.fields[0].shape[0]
        if len(raws) == 2:
            gate, up = (self.first.shape.addresses(raws[0], rows, part) for part in (0, 1))
        else:
            gate, up = (self.first.shape.addresses(raw, rows) for raw in raws[:2])
        down = self.down.shape.addresses(raws[-1], self._layout.fields[-1].shape[0])
        return SamoyedsWeights((gate, up), down, tuple(raws))

    def table(self, weights: Sequence[SamoyedsWeights]) -> ExpertTable:
        """Return the addresses of experts, ready for :meth:`forward`."""
        device = weights[0].raws[0].device
        first, down = [w.first for w in weights], [(w.down,) for w in weights]
        maps: tuple[Tensor, ...] = ()
        if self.wide is not None:
            maps = (self.wide[0].maps(first, device), self.wide[1].maps(down, device))
        return ExpertTable(address_table(first, device), address_table(down, device), tuple(weights), *maps)

    def forward(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, table: ExpertTable, *, wide: bool = False
    ) -> Tensor:
        """Return ``[T, D]`` bf16: the whole layer, weighted and added up in ascending expert id.

        Args:
            x_TD: bf16 rows of all tokens.
            ids_TK: places in ``table``; others ("not mine") add nothing.
            weights_TK: mixing weights.
            table: all experts of the layer.
            wide: by the Hopper kernel.

        Raises:
            FormatError: there is no Hopper kernel for these experts, or activations are not bf16.
        """
        experts, pairs = len(table.weights), ids_TK.numel()
        if wide:
            routing = route_on_device(ids_TK, weights_TK, experts)
            return self._combine(self._wide_experts(x_TD, routing, table), routing)
        tile = choose_tile(len(x_TD), pairs, experts)
        few = route_few(ids_TK, weights_TK, experts, tile.tokens, self._launcher)
        routing, tiles_E1 = (route_on_device(ids_TK, weights_TK, experts), None) if few is None else few
        splits = self.down.splits(pairs, experts, tile)
        y_SPD = self._experts(x_TD, routing.token_P, routing.starts, table, tile, splits, tiles_E1)
        return self._combine(y_SPD, routing)

    def pairs(
        self,
        x_TD: Tensor,
        token_P: Tensor,
        starts: Sequence[int],
        weights: Sequence[SamoyedsWeights],
        experts: Sequence[int],
        out_PD: Tensor | None = None,
    ) -> Tensor:
        """Return ``[P, D]`` in fp32: every pair's output, not yet weighted; see ``ReferenceKernel.pairs``."""
        starts_E1 = torch.tensor(list(starts), dtype=torch.int32).to(x_TD.device)
        most = max((b - a for a, b in pairwise(starts)), default=0)
        tile = choose_tile(most, len(token_P), max(1, len(experts)))
        y_PD = self._experts(
            x_TD.to(torch.bfloat16), token_P.to(torch.int32), starts_E1, self.table(weights), tile, 1
        )[0]
        return y_PD if out_PD is None else out_PD.copy_(y_PD)

    def _experts(
        self,
        x_TD: Tensor,
        token_P: Tensor,
        starts_E1: Tensor,
        table: ExpertTable,
        tile: Tile,
        splits: int,
        tiles_E1: Tensor | None = None,
    ) -> Tensor:
        """``[S, P, D]``: parts of the outputs of every pair, not yet weighted."""
        if x_TD.dtype != torch.bfloat16:
            raise FormatError(f"the GPU kernel takes bf16 activations, not {x_TD.dtype}; convert them first")
        h_PF = x_TD.new_empty(len(token_P), self.first.shape.out_rows)
        y_SPD = x_TD.new_empty(splits, len(token_P), self.down.shape.out_rows, dtype=torch.float32)
        if len(token_P):
            x_TD = x_TD.contiguous()
            self.first(table.first_E24, starts_E1, token_P.contiguous(), x_TD, h_PF, tile, tiles_E1)
            self.down(table.down_E24, starts_E1, None, h_PF, y_SPD, tile, tiles_E1)
        return y_SPD

    def _wide_experts(self, x_TD: Tensor, routing: DeviceRouting, table: ExpertTable) -> Tensor:
        """``[1, P, D]``: outputs of every pair, not yet weighted."""
        if self.wide is None or table.first_maps_E2B is None or table.down_maps_E2B is None:
            raise FormatError("there is no Hopper kernel for these experts on this GPU; leave out wide=True")
        if x_TD.dtype != torch.bfloat16:
            raise FormatError(f"the GPU kernel takes bf16 activations, not {x_TD.dtype}; convert them first")
        (first, down), token_P = self.wide, routing.token_P
        h_PF = x_TD.new_empty(len(token_P), first.shape.out_rows)
        y_1PD = x_TD.new_empty(1, len(token_P), down.shape.out_rows, dtype=torch.float32)
        if len(token_P):
            x_TD, starts = x_TD.contiguous(), routing.starts
            first(table.first_E24, table.first_maps_E2B, starts, token_P, x_TD, h_PF)
            down(table.down_E24, table.down_maps_E2B, starts, None, h_PF, y_1PD[0])
        return y_1PD

    def _combine(self, y_SPD: Tensor, routing: DeviceRouting) -> Tensor:
        tokens, slots = routing.pair_TK.shape
        splits, pairs, columns = y_SPD.shape
        out_TD = y_SPD.new_empty(tokens, columns, dtype=torch.bfloat16)
        if tokens:
            blocks = -(-columns // (4 * SUM_THREADS))
            pair_TK, weight_TK = routing.pair_TK.contiguous(), routing.weight_TK.contiguous()
            self._launcher(
                Launch(_COMBINE, (tokens, blocks), SUM_THREADS),
                (y_SPD, pair_TK, weight_TK, routing.starts[-1:], out_TD, slots, columns, splits, pairs, 1),
            )
        return out_TD


def _gate(layout: ExpertLayout, expert_math: ExpertMath) -> GateForm | None:
    intermediate = layout.fields[-1].shape[1]
    gated = sum(spec.shape[0] for spec in layout.fields[:-1]) == 2 * intermediate
    return recognise_gate(expert_math, intermediate, gated=True) if gated else None
