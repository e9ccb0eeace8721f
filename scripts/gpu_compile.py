"""Compile the kernels that the tests and benchmarks of GPUs use, on all cores at once; the cache keeps them.

    python scripts/gpu_compile.py [ARCH]      by default that of the GPU at hand

NVRTC compiles on one core. What is missing here is compiled when it is first used.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from gangline.core.errors import GanglineError
from gangline.core.layout import FieldSpec
from gangline.formats.registry import sparse_codec
from gangline.kernels.cpu.gates import GateForm
from gangline.kernels.cuda.compiler import KernelBuild, compile_cubin
from gangline.kernels.cuda.samoyeds_matrices import PartShape
from gangline.kernels.cuda.samoyeds_product import SparseProduct
from gangline.kernels.cuda.samoyeds_wgmma import WideProduct, unsupported_wide
from gangline.kernels.cuda.tiles import TILES

PLAIN = ["1:2:32/bf16", "1:2:64/bf16", "1:2:256/bf16"]
PLAIN += ["1:2:32/int8g32", "1:1:32/int8g128", "1:2:128/int4g32", "1:2:32/int4g64"]
LAYERS = ["1:2:128/bf16", "1:1:32/bf16", "1:2:64/int4g32", "1:2:128/int4g64"]
SUMS = (
    KernelBuild("combine.cu", "gangline_combine"),
    KernelBuild("route.cu", "gangline_route"),
    KernelBuild("gate.cu", "gangline_gate", (("GANGLINE_ACTIVATION", "0"),)),
)


class Architecture:
    """A launcher that starts nothing: it only says for what to compile."""

    multiprocessors = 132

    def __init__(self, arch: str) -> None:
        self.arch = arch


def builds(arch: str) -> Iterator[KernelBuild]:
    """Every kernel once, the slowest to compile first."""
    launcher = Architecture(arch)
    for pattern in (*LAYERS, *PLAIN):
        found, size = sparse_codec(f"samoyeds:{pattern}"), (256, 256)
        shape = PartShape.of(FieldSpec("down", size, found.name, found.nbytes(size)))
        for gate in [None, GateForm("silu")] if pattern in LAYERS else [None]:
            if unsupported_wide(shape.codec, arch) is None:
                yield WideProduct(shape, launcher, gate).build()
            for tile in reversed(TILES):
                product = SparseProduct(shape, launcher, gate)
                yield product.build(tile)
                if gate is not None and tile.small:
                    yield product.build(tile, split=True)
    yield from SUMS


def main() -> None:
    """Compile all; say which failed."""
    if len(sys.argv) > 1:
        arch = sys.argv[1]
    else:
        import torch

        from gangline.kernels.cuda.launcher import CudaLauncher

        arch = CudaLauncher(torch.device("cuda", 0)).arch
    wanted, failed = list(dict.fromkeys(builds(arch))), 0
    with ProcessPoolExecutor() as pool:
        for done in as_completed([pool.submit(compile_cubin, build, arch) for build in wanted]):
            try:
                done.result()
            except GanglineError as error:
                failed += 1
                print(error)
    print(f"{len(wanted) - failed} of {len(wanted)} kernels compiled for {arch}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
