"""The products of ``samoyeds_product.py`` by Hopper's own instructions, for prompts: ``csrc/cuda/wgmma.cu``.

Shape suffixes: P pairs sorted by expert, E experts, 2 parts, 4 addresses, B bytes of a tensor map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gangline.core.errors import FormatError
from gangline.formats.samoyeds import TILE, SamoyedsCodec
from gangline.kernels.cpu.gates import GateForm
from gangline.kernels.cuda.compiler import KernelBuild
from gangline.kernels.cuda.launcher import Launch, Launcher
from gangline.kernels.cuda.routing import most_tiles, token_tiles
from gangline.kernels.cuda.samoyeds_matrices import ALIGN, Addresses, PartShape
from gangline.kernels.cuda.samoyeds_product import MOST_TILES, activation_number, gate_numbers
from gangline.kernels.cuda.tiles import unsupported_codec

ARCH = "sm_90a"
_COLUMNS, _STEP = 128, 32
_ROWS, _TOKENS, _THREADS, _STAGES = 64, 128, 384, 4
_STAGE_BYTES = 2 * _ROWS * _COLUMNS + _TOKENS * 2 * _COLUMNS
# A row number for every token slot and two barriers for every stage.
_SHARED_BYTES = _STAGES * _STAGE_BYTES + 4 * _TOKENS + 16 * _STAGES


def unsupported_wide(codec: SamoyedsCodec, arch: str) -> str | None:
    """Why the Hopper kernel cannot read matrices in ``codec``, or None if it can."""
    if arch != ARCH:
        return f"its instructions are those of {ARCH}, not of {arch}"
    if codec.values.name != "bf16":
        return f"values are {codec.values.name}; the kernel reads bf16"
    return unsupported_codec(codec)


@dataclass(frozen=True)
class WideProduct:
    """``W x``, or ``act(W_gate x) * (W_up x)`` where there is a gate.

    Attributes:
        shape: of the matrices.
        launcher: starts the kernel.
        gate: formula of a gated product; None for a plain one.
    """

    shape: PartShape
    launcher: Launcher
    gate: GateForm | None = None

    def maps(self, parts: Sequence[Sequence[Addresses]], device: torch.device) -> Tensor:
        """``[E, 2, B]`` uint8: how the copy engine finds the values of every part; see ``Launcher``."""
        rows, columns = self.shape.row_tiles * TILE, self.shape.columns // 2
        maps = [
            [
                self.launcher.tensor_map(part[0], columns=columns, rows=rows, box=(_COLUMNS // 2, _ROWS))
                for part in (*of_expert, *of_expert)[:2]
            ]
            for of_expert in parts
        ]
        return torch.stack([torch.stack(of_expert) for of_expert in maps]).to(device)

    def __call__(
        self,
        parts_E24: Tensor,
        maps_E2B: Tensor,
        starts: Tensor,
        rows_P: Tensor | None,
        x: Tensor,
        out: Tensor,
    ) -> None:
        """Fill ``out``; see :meth:`SparseProduct.__call__`, which takes the same without ``maps_E2B``."""
        experts, pairs = len(parts_E24), len(out)
        tiles = most_tiles(pairs, experts, _TOKENS)
        if tiles > MOST_TILES:
            raise FormatError(f"{pairs} pairs are too many for one launch; feed fewer tokens at once")
        x = x if x.data_ptr() % ALIGN == 0 else x.clone()
        of_block = _ROWS // TILE * (1 if self.gate else 2)
        grid = (-(-self.shape.row_tiles // of_block), tiles)
        shape, pattern = self.shape, self.shape.codec.pattern
        sizes = (shape.columns, shape.in_columns, shape.sub_pitch, shape.row_tiles, shape.out_rows, pattern.v)
        tensors = (maps_E2B, parts_E24, starts, token_tiles(starts, _TOKENS), rows_P, x, out)
        self.launcher(
            Launch(self.build(), grid, _THREADS, _SHARED_BYTES),
            (*tensors, experts, *sizes, *gate_numbers(self.gate)),
        )

    def build(self) -> KernelBuild:
        """The kernel."""
        pattern = self.shape.codec.pattern
        columns = min(_COLUMNS, pattern.v) if pattern.m > 1 else _COLUMNS
        macros = {
            "SETS": pattern.m - pattern.n + 1,
            "GATED": str(self.gate is not None).lower(),
            "ACTIVATION": activation_number(self.gate),
            "UNIT": columns // _STEP,
            "STAGES": _STAGES,
        }
        return KernelBuild(
            "wgmma.cu",
            "gangline_wgmma",
            tuple((f"GANGLINE_{name}", str(value)) for name, value in macros.items()),
        )
