"""How fast the native kernels multiply tiled weights: from memory for one token, from caches for many.

    python benchmarks/cpu_kernels.py --rounds 7 --out benchmarks/results/cpu_kernels.json

The matrices have the shape of OLMoE-1B-7B's gate and up projections (2048 x 2048) and together are larger
than any cache, so that one token streams them from memory: its speed is GB/s of weight bytes, its bound the
best read bandwidth that as many threads show between the rounds. Many tokens are counted in 10^9
multiplications and additions a second. The peer is torch's bf16 linear on weights of the same shape; both
sides take turns in every round.
"""

import argparse
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.nn.functional import linear

from gangline.benchmarks.result import Row, compare, write_result
from gangline.core.errors import UsageError
from gangline.formats import get_codec
from gangline.kernels.cpu import native
from gangline.runtime.best_bandwidth import best_ram

SIZE = 2048
CODECS = (
    "tile16:int4g32d",
    "tile16:int4g64",
    "tile16:int4g128z",
    "tile16:int8g32",
    "tile16:int8g64d",
    "tile16:int3g32d",
    "tile16:int2g32d",
    "tile16:mxfp4",
)
PEER = "torch bf16 linear"


class Weights:
    """Many matrices in one codec, end to end on huge pages, as the expert slots of the runtime lie."""

    def __init__(self, core: ModuleType, codec: str, total: int) -> None:
        self.nbytes = get_codec(codec).nbytes((SIZE, SIZE))
        self._map = mmap.mmap(-1, total // self.nbytes * self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        space = np.frombuffer(self._map, np.uint8).reshape(-1, self.nbytes)
        if codec == "bf16":
            raw = torch.randn(SIZE, SIZE).to(torch.bfloat16).view(torch.uint8).flatten()
        elif codec == "tile16:mxfp4":
            # Exponents near one, codes of any kind: it is only decoded, never made.
            raw = torch.randint(0, 256, (self.nbytes,), dtype=torch.uint8)
            raw.view(SIZE // 16, -1)[:, : SIZE // 2] = 120
        else:
            raw = get_codec(codec).encode(torch.randn(SIZE, SIZE))
        space[:] = raw.numpy()
        begin = space.ctypes.data
        self.tensors = [torch.from_numpy(one) for one in space]
        self.matrices = [
            core.Matrix(begin + index * self.nbytes, SIZE, SIZE, codec) for index in range(len(space))
        ]


def timed(run: Callable[[], None]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Side:
    """One codec: products with one token through all matrices, and with many through a few."""

    def __init__(self, core: ModuleType, codec: str, total: int, most: int) -> None:
        self.codec = codec
        self._core = core
        self.weights = Weights(core, codec, total)
        self._x = torch.randn(most, SIZE)
        self._y = torch.empty(most, SIZE)

    def run(self, tokens: int, matrices: int) -> float:
        """Return seconds for one product with each of the first ``matrices``."""
        x, y, product = self._x.data_ptr(), self._y.data_ptr(), self._core._matmul
        chosen = self.weights.matrices[:matrices]

        def work() -> None:
            for matrix in chosen:
                product(matrix, x, tokens, y)

        return timed(work)


class TorchSide(Side):
    """torch's bf16 linear on the same kind of memory."""

    def run(self, tokens: int, matrices: int) -> float:
        """Return seconds for one product with each of the first ``matrices``."""
        x = self._x[:tokens].to(torch.bfloat16)
        chosen = [raw.view(torch.bfloat16).view(SIZE, SIZE) for raw in self.weights.tensors[:matrices]]

        def work() -> None:
            for weight in chosen:
                linear(x, weight)

        return timed(work)


def decode_row(side: Side, peer: Side, rounds: int, threads: int) -> Row:
    """One token through all matrices; the bound is the best bandwidth seen around the runs."""
    ours, theirs, bounds = [], [], [best_ram(threads)]
    for _ in range(rounds):
        count = len(side.weights.matrices)
        ours.append(count * side.weights.nbytes / side.run(1, count) / 1e9)
        count = len(peer.weights.matrices)
        theirs.append(count * peer.weights.nbytes / peer.run(1, count) / 1e9)
        bounds.append(best_ram(threads))
    bound = max(bounds) / 1e9
    print(f"{side.codec} 1 token: {ours} GB/s of {bound}, {PEER} {theirs}", flush=True)
    shares = [value / bound for value in ours]
    return compare(f"{side.codec}, 1 token", "GB/s", ours, PEER, theirs, bound_shares=shares)


def prefill_row(side: Side, peer: Side, tokens: int, rounds: int) -> Row:
    """Many tokens through a few matrices."""
    matrices = max(2, 128 // tokens)
    work = 2 * tokens * SIZE * SIZE * matrices / 1e9
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(work / side.run(tokens, matrices))
        theirs.append(work / peer.run(tokens, matrices))
    print(f"{side.codec} {tokens} tokens: {statistics.median(ours):.0f} GOP/s", flush=True)
    return compare(f"{side.codec}, {tokens} tokens", "GOP/s", ours, PEER, theirs)


def main() -> None:
    """Measure every codec and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--codecs", nargs="+", default=list(CODECS))
    add("--tokens", type=int, nargs="+", default=[16, 64, 512])
    add("--total-mb", type=int, default=1100, help="size of all matrices of a codec, in 10^6 bytes")
    add("--kernels", help="table of kernels; by default the widest")
    add("--out", type=Path, help="result file, for example benchmarks/results/cpu_kernels.json")
    args = parser.parse_args()
    core = native()
    if core is None:
        raise UsageError("the native core is not built; install a compiler and install gangline again")
    if args.kernels:
        core.use_kernels(args.kernels)
    core.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    total = args.total_mb * 10**6
    peer = TorchSide(core, "bf16", total, max(args.tokens))
    rows: list[Row] = []
    for codec in args.codecs:
        side = Side(core, codec, total, max(args.tokens))
        rows.append(decode_row(side, peer, args.rounds, args.threads))
        rows += [prefill_row(side, peer, tokens, args.rounds) for tokens in args.tokens]
        del side
    if args.out:
        machine = {"kernels": core.kernels_name(), "threads": args.threads}
        write_result(args.out.stem, rows, folder=args.out.parent, machine=machine)


if __name__ == "__main__":
    main()
