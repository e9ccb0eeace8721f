"""Sparse experts on the CPU beside dense ones of the same shapes, both on the native core.

    python benchmarks/samoyeds/cpu_layer.py --rounds 7 --out benchmarks/results/samoyeds_cpu_layer.json

Decoding: one token through the experts that it would be routed to, other ones in every call, all together
larger than the caches; the bound is the best bandwidth that the machine shows around every run. Prefill: two
experts, each with its share of 512 tokens; dense bf16 is then torch's own product, which is faster there.
Peers take turns in every round, so that ratios are of neighbours in time. Weights are random: 128 rows,
pruned by magnitude and encoded, repeated down the matrix and in every expert, each at an address of its own.

Shape suffixes: T tokens, D hidden, G gate/up columns, F intermediate, O rows, I columns.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from gangline.benchmarks.result import Row, compare, write_result
from gangline.benchmarks.roofline import Beside
from gangline.core.errors import UsageError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec
from gangline.formats.samoyeds import SparseCodec
from gangline.formats.samoyeds_arrays import prune_magnitude
from gangline.kernels.choice import set_native_threads
from gangline.kernels.cpu import native
from gangline.kernels.cpu.huge_pages import empty
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.reference import ExpertMath
from gangline.runtime.best_bandwidth import best_ram

PROMPT = 512
PATTERN_ROWS = 128


@dataclass(frozen=True)
class Shape:
    """One layer: its experts' sizes and how many there are and are used."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = (
    Shape("OLMoE-1B-7B", 64, 8, 2048, 1024),
    Shape("Qwen1.5-MoE-A2.7B", 60, 4, 2048, 1408),
    Shape("DeepSeek-MoE-16B", 64, 6, 2048, 1408),
    Shape("Mixtral-8x7B", 8, 2, 4096, 14336),
)
# Sparse formats beside the dense ones that each is compared with; int4 with scales of 16 bits, as the sparse
# codes have them, and with those of 8 bits that `--precision int4` means.
INT4 = ("tile16:int4g32", "tile16:int4g32d")
PEERS: dict[str, tuple[str, ...]] = {
    "samoyeds16:1:2:32/bf16": ("bf16",),
    "samoyeds16:1:2:128/bf16": ("bf16",),
    "samoyeds16:1:1:32/bf16": ("bf16",),
    "samoyeds16:1:2:32/int4g32": INT4,
    "samoyeds16:1:2:128/int4g32": INT4,
    "samoyeds16:1:1:32/int4g32": INT4,
}


def swiglu(h_NG: Tensor) -> Tensor:
    """The gate of all shapes."""
    gate_NF, up_NF = h_NG.chunk(2, dim=-1)
    return silu(gate_NF) * up_NF


def matrix_bytes(codec_name: str, rows: int, columns: int) -> Tensor:
    """A matrix whose rows repeat after ``PATTERN_ROWS``, as no two tiles share anything."""
    codec = get_codec(codec_name)
    w_OI = torch.randn(PATTERN_ROWS, columns) / columns**0.5
    if isinstance(codec, SparseCodec):
        w_OI = prune_magnitude(w_OI, codec.pattern)
    if codec_name == "bf16":
        w_OI = w_OI.bfloat16()
    return codec.encode(w_OI).repeat(rows // PATTERN_ROWS)


class Side:
    """One format: as many experts as are larger than the caches."""

    def __init__(self, shape: Shape, codec: str, total: int) -> None:
        named = {
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        raws = [matrix_bytes(codec, *sizes) for sizes in named.values()]
        fields = [
            FieldSpec(name, sizes, codec, len(raw))
            for (name, sizes), raw in zip(named.items(), raws, strict=True)
        ]
        self.nbytes = sum(len(raw) for raw in raws)
        self._kernel = NativeKernel(ExpertLayout(tuple(fields)), ExpertMath(swiglu))
        count = max(2 * shape.top_k, total // self.nbytes // shape.top_k * shape.top_k)
        # As experts lie in the engine's slots.
        space = empty((count, self.nbytes), torch.uint8)
        space[:] = torch.cat(raws)
        self._experts = [self._kernel.bind(one.split([len(r) for r in raws])) for one in space]
        self._shape = shape

    def decode(self, x_TD: Tensor) -> float:
        """Seconds of one expert: the median over calls with one token, each through other experts."""
        used = self._shape.top_k
        y_PD = torch.empty(used, self._shape.hidden)
        token_P, starts = torch.zeros(used, dtype=torch.int64), range(used + 1)
        times = []
        for first in range(0, len(self._experts), used):
            chosen = self._experts[first : first + used]
            start = time.perf_counter()
            self._kernel.pairs(x_TD[:1], token_P, starts, chosen, range(used), y_PD)
            times.append((time.perf_counter() - start) / used)
        return statistics.median(times)

    def prefill(self, x_TD: Tensor) -> float:
        """Seconds of one expert with its share of a prompt, of two that are computed together."""
        rows = len(x_TD)
        start = time.perf_counter()
        token_P = torch.arange(rows).repeat(2)
        self._kernel.pairs(x_TD, token_P, (0, rows, 2 * rows), self._experts[:2], range(2))
        return (time.perf_counter() - start) / 2


def decode_rows(shape: Shape, sides: dict[str, Side], rounds: int, threads: int) -> list[Row]:
    """All formats, one token."""
    times: dict[str, list[float]] = {codec: [] for codec in sides}
    shares: dict[str, list[float]] = {codec: [] for codec in sides}
    for _ in range(rounds):
        x_TD = torch.randn(1, shape.hidden).bfloat16()
        before, now = best_ram(threads), {codec: side.decode(x_TD) for codec, side in sides.items()}
        beside = Beside(before, best_ram(threads))
        for codec, seconds in now.items():
            times[codec].append(1e6 * seconds)
            shares[codec].append(beside.share(sides[codec].nbytes, seconds))
    return [one for codec in times for one in compared(shape, codec, "decode, 1 token", times, shares[codec])]


def prefill_rows(shape: Shape, sides: dict[str, Side], rounds: int) -> list[Row]:
    """All formats, a prompt's share for each expert."""
    tokens = PROMPT * shape.top_k // shape.experts
    times: dict[str, list[float]] = {codec: [] for codec in sides}
    for _ in range(rounds):
        x_TD = torch.randn(tokens, shape.hidden).bfloat16()
        for codec, side in sides.items():
            times[codec].append(1e6 * side.prefill(x_TD))
    work = f"prefill, {PROMPT} tokens ({tokens} an expert)"
    return [one for codec in times for one in compared(shape, codec, work, times)]


def compared(
    shape: Shape, codec: str, work: str, times: dict[str, list[float]], shares: list[float] | None = None
) -> list[Row]:
    """One number beside each of its dense peers, or alone if the format is dense."""
    rows = []
    for peer in PEERS.get(codec, (None,)):
        made = compare(
            f"{shape.name}, {codec}, {work}",
            "us/expert",
            times[codec],
            peer,
            times[peer] if peer else (),
            higher_is_better=False,
            bound_shares=shares or (),
        )
        ratio = f"{made.ratio:.2f} x {peer}" if made.ratio is not None else ""
        share = f"{made.bound_share:.2f} of the bound" if made.bound_share is not None else ""
        print(f"{made.work}: {statistics.median(times[codec]):.0f} us", ratio, share, flush=True)
        rows.append(made)
    return rows


def main() -> None:
    """Measure every shape and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    add("--codecs", nargs="+", default=list(PEERS), help="sparse formats; their dense peers come with them")
    add("--total-mb", type=int, default=400, help="experts of one format, in 10^6 bytes")
    add("--kernels", help="table of kernels; by default the widest")
    add("--out", type=Path, help="result file, for example benchmarks/results/samoyeds_cpu_layer.json")
    args = parser.parse_args()
    core = native()
    if core is None:
        raise UsageError("the native core is not built; install a compiler and install gangline again")
    if args.kernels:
        core.use_kernels(args.kernels)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    set_native_threads(args.threads)
    formats = list(dict.fromkeys(name for codec in args.codecs for name in (*PEERS[codec], codec)))
    rows: list[Row] = []
    for shape in SHAPES:
        if shape.name in args.shapes:
            sides = {codec: Side(shape, codec, args.total_mb * 10**6) for codec in formats}
            rows += decode_rows(shape, sides, args.rounds, args.threads)
            rows += prefill_rows(shape, sides, args.rounds)
    if args.out:
        machine = {"kernels": core.kernels_name(), "threads": args.threads}
        write_result(args.out.stem, rows, folder=args.out.parent, machine=machine)


if __name__ == "__main__":
    main()
