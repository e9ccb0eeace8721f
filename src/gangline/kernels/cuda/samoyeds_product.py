"""One product of all experts' matrices with the rows of x that are theirs, on sparse tensor cores.

Shape suffixes: P pairs sorted by expert, E experts, 2 parts, 4 addresses, S parts of the columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.kernels.cpu.gates import GateForm
from gangline.kernels.cuda.compiler import KernelBuild
from gangline.kernels.cuda.launcher import Launch, Launcher
from gangline.kernels.cuda.routing import most_tiles, token_tiles
from gangline.kernels.cuda.samoyeds_matrices import ALIGN, PartShape
from gangline.kernels.cuda.tiles import MANY, SOME, Stage, Tile, choose_splits, defines, stage_of

MOST_TILES = 65535  # blocks of a grid in its second direction
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "swiglu_oai")
SUM_THREADS = 128


def activation_number(gate: GateForm | None) -> int:
    """The macro ``GANGLINE_ACTIVATION``."""
    return ACTIVATIONS.index(gate.name.removesuffix(":late")) if gate else 0


def gate_numbers(gate: GateForm | None) -> tuple[float, float, int]:
    """The last arguments of kernels that may apply a gate: alpha, limit, late."""
    gate = gate or GateForm("identity")
    return float(gate.alpha), float(gate.limit), int(gate.name.endswith(":late"))


@dataclass(frozen=True)
class SparseProduct:
    """``W x``, or ``act(W_gate x) * (W_up x)`` where there is a gate.

    Attributes:
        shape: of the matrices.
        launcher: starts the kernel.
        gate: formula of a gated product; None for a plain one.
    """

    shape: PartShape
    launcher: Launcher
    gate: GateForm | None = None

    def __call__(
        self,
        parts_E24: Tensor,
        starts: Tensor,
        rows_P: Tensor | None,
        x: Tensor,
        out: Tensor,
        tile: Tile,
        tiles_E1: Tensor | None = None,
    ) -> None:
        """Fill ``out``. Rows past ``starts[E]`` stay.

        Args:
            parts_E24: addresses of every expert's parts.
            starts: int32 ``[E + 1]``, first pair of every expert.
            rows_P: int32 row of ``x`` of every pair, or None where pair p is row p.
            x: bf16 rows, contiguous.
            out: where to write, contiguous: ``[P, out_rows]``, bf16 where gated, fp32 where plain; a plain
                product may be split, ``[S, P, out_rows]``: the sum over S is the product (see ``splits``).
            tile: what a block makes; a smaller one is taken where the GPU cannot hold it.
            tiles_E1: ``token_tiles(starts, tile.tokens)``, where it is known.

        Raises:
            FormatError: more pairs than one launch can have.
        """
        if most_tiles(out.shape[-2], len(parts_E24), tile.tokens) > MOST_TILES:
            raise FormatError(f"{out.shape[-2]} pairs are too many for one launch; feed fewer tokens at once")
        # Rows are copied 16 bytes at a time; a view into another tensor may start between.
        x = x if x.data_ptr() % ALIGN == 0 else x.clone()
        if self.gate is None:
            splits = out.shape[0] if out.dim() == 3 else 1
            self._launch(parts_E24, starts, rows_P, x, out, tile, splits, tiles_E1)
            return
        splits = self.splits(len(out), len(parts_E24), tile)
        if splits == 1:
            self._launch(parts_E24, starts, rows_P, x, out, tile, 1, tiles_E1)
            return
        parts_S2PF = x.new_empty(splits, 2, *out.shape, dtype=torch.float32)
        self._launch(parts_E24, starts, rows_P, x, parts_S2PF, tile, splits, tiles_E1)
        self._apply_gate(parts_S2PF, starts, out)

    def splits(self, pairs: int, experts: int, tile: Tile) -> int:
        """Into how many parts the columns should go; fixed by the sizes and the GPU, not by the routing."""
        tile, stage = self._sizes(tile)
        blocks = self._row_blocks(tile) * most_tiles(pairs, experts, tile.tokens)
        stages = -(-self.shape.columns // stage.columns)
        return choose_splits(tile, blocks, stages, self.launcher.multiprocessors)

    def build(self, tile: Tile, *, split: bool = False) -> KernelBuild:
        """The kernel for a tile."""
        tile, stage = self._sizes(tile)
        gated = self.gate is not None
        number = activation_number(self.gate)
        macros = defines(self.shape.codec, tile, stage, gated=gated, activation=number, split=gated and split)
        return KernelBuild("ssmm.cu", "gangline_ssmm", macros)

    def _launch(
        self,
        parts_E24: Tensor,
        starts: Tensor,
        rows_P: Tensor | None,
        x: Tensor,
        out: Tensor,
        asked: Tile,
        splits: int,
        tiles_E1: Tensor | None,
    ) -> None:
        tile, stage = self._sizes(asked)
        if tiles_E1 is None or tile != asked:
            tiles_E1 = token_tiles(starts, tile.tokens)
        experts, pairs = len(parts_E24), out.shape[-2]
        grid = (self._row_blocks(tile) * splits, most_tiles(pairs, experts, tile.tokens))
        tensors = (parts_E24, starts, tiles_E1, rows_P, x, out)
        self.launcher(
            Launch(self.build(tile, split=splits > 1), grid, tile.threads, stage.shared_bytes(tile)),
            (*tensors, experts, splits, pairs, *self.shape.arguments(), *gate_numbers(self.gate)),
        )

    def _apply_gate(self, parts_S2PF: Tensor, starts: Tensor, out_PF: Tensor) -> None:
        splits, _, pairs, columns = parts_S2PF.shape
        macros = (("GANGLINE_ACTIVATION", str(activation_number(self.gate))),)
        build = KernelBuild("gate.cu", "gangline_gate", macros)
        self.launcher(
            Launch(build, (pairs, -(-columns // (4 * SUM_THREADS))), SUM_THREADS),
            (parts_S2PF, starts[-1:], out_PF, pairs, columns, splits, *gate_numbers(self.gate)),
        )

    def _row_blocks(self, tile: Tile) -> int:
        return -(-self.shape.row_tiles // (tile.wm if self.gate else 2 * tile.wm))

    def _sizes(self, tile: Tile) -> tuple[Tile, Stage]:
        arch = self.launcher.arch
        stage = stage_of(self.shape.codec, tile, arch)
        if tile == MANY and not stage.fits(tile, arch):
            return SOME, stage_of(self.shape.codec, SOME, arch)
        return tile, stage
