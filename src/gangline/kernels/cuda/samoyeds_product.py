"""One launch of the SSMM kernel: products of all experts' matrices with the rows of x that are theirs.

Shape suffixes: P pairs sorted by expert, E experts, 2 parts, 4 addresses.
"""

from dataclasses import dataclass

from torch import Tensor

from gangline.core.errors import FormatError
from gangline.kernels.cpu.gates import GateForm
from gangline.kernels.cuda.compiler import KernelBuild
from gangline.kernels.cuda.launcher import Launch, Launcher
from gangline.kernels.cuda.routing import most_tiles, token_tiles
from gangline.kernels.cuda.samoyeds_matrices import ALIGN, PartShape
from gangline.kernels.cuda.tiles import MANY, SOME, Stage, Tile, defines, stage_of

_MOST_TILES = 65535  # blocks of a grid in its second direction
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "swiglu_oai")


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
        self, parts_E24: Tensor, starts: Tensor, rows_P: Tensor | None, x: Tensor, out: Tensor, tile: Tile
    ) -> None:
        """Fill ``out``, ``[P, out_rows]``: bf16 where gated, fp32 where plain. Rows past ``starts[E]`` stay.

        Args:
            parts_E24: addresses of every expert's parts.
            starts: int32 ``[E + 1]``, first pair of every expert.
            rows_P: int32 row of ``x`` of every pair, or None where pair p is row p.
            x: bf16 rows, contiguous.
            out: where to write, contiguous.
            tile: what a block makes; a smaller one is taken where the GPU cannot hold it.

        Raises:
            FormatError: more pairs than one launch can have.
        """
        tile, stage = self._sizes(tile)
        experts = len(parts_E24)
        if most_tiles(len(out), experts, tile.tokens) > _MOST_TILES:
            raise FormatError(f"{len(out)} pairs are too many for one launch; feed fewer tokens at once")
        # Rows are copied 16 bytes at a time; a view into another tensor may start between.
        x = x if x.data_ptr() % ALIGN == 0 else x.clone()
        row_blocks = -(-self.shape.row_tiles // (tile.wm if self.gate else 2 * tile.wm))
        grid = (row_blocks, most_tiles(len(out), experts, tile.tokens))
        gate = self.gate or GateForm("identity")
        formula = (float(gate.alpha), float(gate.limit), int(gate.name.endswith(":late")))
        tensors = (parts_E24, starts, token_tiles(starts, tile.tokens), rows_P, x, out)
        self.launcher(
            Launch(self.build(tile), grid, tile.threads, stage.shared_bytes(tile)),
            (*tensors, experts, *self.shape.arguments(), *formula),
        )

    def build(self, tile: Tile) -> KernelBuild:
        """The kernel for a tile."""
        tile, stage = self._sizes(tile)
        activation = ACTIVATIONS.index(self.gate.name.removesuffix(":late")) if self.gate else 0
        gated = self.gate is not None
        macros = defines(self.shape.codec, tile, stage, gated=gated, activation=activation)
        return KernelBuild("ssmm.cu", "gangline_ssmm", macros)

    def _sizes(self, tile: Tile) -> tuple[Tile, Stage]:
        arch = self.launcher.arch
        stage = stage_of(self.shape.codec, tile, arch)
        if tile == MANY and not stage.fits(tile, arch):
            return SOME, stage_of(self.shape.codec, SOME, arch)
        return tile, stage
