"""One MoE layer on the CPU: the native core next to what torch offers, on the same routing, in turns.

    python benchmarks/moe_layer_cpu.py --rounds 5 --pin --out benchmarks/results/moe_layer_cpu.json

Each round takes new tokens and new random experts (uniform routing), so that decoding finds few of them in
the caches; memory bandwidth is measured around every round. Decoding's bound is the time to read the bytes of
the experts in use once. All experts of a layer have the same values at addresses of their own. Peers have
bf16 activations; theirs of 4 and 8 bits have one product an expert and matrix, as torch offers no other.
``--pin`` keeps each thread on a core of its own while it is timed: on a machine that has other work the
system else puts two threads on one core for seconds at a time.

Shape suffixes: T tokens, K experts per token, P pairs, N pairs of one expert, D hidden, F intermediate, G
gate/up columns, E experts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from gangline.benchmarks.result import Row, compare, write_result
from gangline.benchmarks.roofline import Beside
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats import get_codec
from gangline.kernels.choice import set_native_threads
from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.grouping import Grouping, group_by_expert
from gangline.kernels.reference import ExpertMath
from gangline.kernels.sums import accumulate
from gangline.runtime.bandwidth import measure_ram

Layer = Callable[[Tensor, Grouping], Tensor]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


SHAPES = (
    LayerShape("OLMoE-1B-7B", 64, 8, 2048, 1024),
    LayerShape("Qwen3-30B-A3B", 128, 8, 2048, 768),
)
CODECS = ("tile16:int4g32d", "tile16:int8g64d", "bf16", "ggml:Q4_0", "ggml:Q8_0")
WORK = {"decode, 1 token": 1, "decode, 8 tokens": 8, "prefill, 512 tokens": 512}
# A decode step is short: this many, each with experts of its own, make one reading.
STEPS = {1: 20, 8: 4, 512: 1}


def swiglu(h_PG: Tensor) -> Tensor:
    """The gate of both shapes."""
    gate_PF, up_PF = h_PG.chunk(2, dim=-1)
    return silu(gate_PF) * up_PF


def spread_out(raw: Tensor, count: int) -> Tensor:
    """``count`` copies of ``raw`` one after another, on huge pages where the system has them."""
    copies = torch.from_numpy(np.empty((count, *raw.shape), np.uint8)).view(torch.uint8)
    copies[:] = raw
    return copies


def weights_of(shape: LayerShape) -> tuple[Tensor, Tensor]:
    """One expert's matrices: ``[G, D]`` and ``[D, F]``."""
    torch.manual_seed(0)
    w_GD = torch.randn(2 * shape.intermediate, shape.hidden) / shape.hidden**0.5
    return w_GD, torch.randn(shape.hidden, shape.intermediate) / shape.intermediate**0.5


def native_layer(shape: LayerShape, codec: str) -> tuple[Layer, int]:
    """The native core on experts in a codec, and the bytes of one expert."""
    named = zip(("gate_up", "down"), weights_of(shape), strict=True)
    fields, raws = [], []
    for name, w in named:
        raw = get_codec(codec).encode(w)
        fields.append(FieldSpec(name, (w.shape[0], w.shape[1]), codec, len(raw)))
        raws.append(raw)
    layout = ExpertLayout(tuple(fields))
    kernel = NativeKernel(layout, ExpertMath(swiglu))
    records = spread_out(torch.cat(raws), shape.experts)
    bound = [kernel.bind(record.split([f.nbytes for f in fields])) for record in records]
    room: dict[int, Tensor] = {}

    def forward(x_TD: Tensor, grouping: Grouping) -> Tensor:
        pairs = len(grouping.token_P)
        y_PD = room.setdefault(pairs, torch.empty(pairs, shape.hidden))
        weights = [bound[expert] for expert in grouping.experts]
        kernel.pairs(x_TD, grouping.token_P, grouping.starts, weights, grouping.experts, y_PD)
        out_TD = torch.zeros(x_TD.shape)
        accumulate(y_PD, grouping, out_TD)
        return out_TD

    return forward, layout.nbytes


def per_expert(product: Callable[[Tensor, int, int], Tensor]) -> Layer:
    """A layer as a loop over experts; ``product(x, matrix, expert)`` multiplies with matrix 0 or 1."""

    def forward(x_TD: Tensor, grouping: Grouping) -> Tensor:
        out_TD = torch.zeros(x_TD.shape)
        for index, expert in enumerate(grouping.experts):
            h_NF = swiglu(product(x_TD[grouping.tokens(index)], 0, expert))
            grouping.add(index, product(h_NF, 1, expert), out_TD)
        return out_TD

    return forward


def linear_layer(shape: LayerShape) -> Layer:
    """torch's ``linear`` in bf16."""
    stacks = [bf16_stack(w, shape.experts) for w in weights_of(shape)]
    return per_expert(lambda x, matrix, expert: linear(x, stacks[matrix][expert]))


def grouped_layer(shape: LayerShape) -> Layer:
    """torch's ``grouped_mm`` in bf16: one product for all experts."""
    stacks = [bf16_stack(w, shape.experts).transpose(1, 2) for w in weights_of(shape)]

    def forward(x_TD: Tensor, grouping: Grouping) -> Tensor:
        ends = torch.zeros(shape.experts, dtype=torch.int32)
        ends[list(grouping.experts)] = torch.tensor(grouping.counts, dtype=torch.int32)
        ends = ends.cumsum(0, dtype=torch.int32)
        h_PG = torch.nn.functional.grouped_mm(x_TD[grouping.token_P], stacks[0], offs=ends)
        y_PD = torch.nn.functional.grouped_mm(swiglu(h_PG), stacks[1], offs=ends)
        out_TD = torch.zeros(x_TD.shape)
        return out_TD.index_add_(0, grouping.token_P, y_PD.float() * grouping.weight_P1)

    return forward


def int4pack_layer(shape: LayerShape) -> Layer:
    """torch's 4-bit product with scales and offsets of groups of 32 in bf16."""
    packed, scales = [], []
    for w in weights_of(shape):
        groups = w.view(w.shape[0], -1, 32)
        scale = groups.abs().amax(-1) / 7
        codes = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int32).view(w.shape) + 8
        once = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        packed.append(spread_out(once, shape.experts))
        both = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
        scales.append(bf16_stack(both, shape.experts))
    return per_expert(
        lambda x, matrix, expert: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed[matrix][expert], 32, scales[matrix][expert]
        )
    )


def int8pack_layer(shape: LayerShape) -> Layer:
    """torch's 8-bit product with one scale a row."""
    stacks, scales = [], []
    for w in weights_of(shape):
        scale = w.abs().amax(-1) / 127
        codes = (w / scale[:, None]).round().to(torch.int8)
        stacks.append(spread_out(codes.view(torch.uint8), shape.experts).view(torch.int8))
        scales.append(scale.bfloat16())
    return per_expert(
        lambda x, matrix, expert: torch.ops.aten._weight_int8pack_mm(
            x, stacks[matrix][expert], scales[matrix]
        )
    )


def bf16_stack(w: Tensor, experts: int) -> Tensor:
    """``experts`` copies in bf16."""
    raw = w.bfloat16().contiguous().view(torch.uint8)
    return spread_out(raw, experts).view(torch.bfloat16)


PEERS: dict[str, dict[str, Callable[[LayerShape], Layer]]] = {
    "tile16:int4g32d": {"torch int4pack, g32": int4pack_layer},
    "tile16:int8g64d": {"torch int8pack, one scale a row": int8pack_layer},
    "bf16": {"torch linear, bf16": linear_layer, "torch grouped_mm, bf16": grouped_layer},
}


@contextmanager
def pinned(pin: bool) -> Iterator[None]:
    """Keep the calling thread on the first core."""
    cores = os.sched_getaffinity(0)
    if pin:
        os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def pin_workers(start: Callable[[], object]) -> None:
    """Keep each thread that ``start`` makes on a core of its own, beside the calling thread's."""
    threads = Path("/proc/self/task")
    before = set(threads.iterdir())
    start()
    new = sorted(int(thread.name) for thread in set(threads.iterdir()) - before)
    for thread, core in zip(new, sorted(os.sched_getaffinity(0))[1:], strict=False):
        os.sched_setaffinity(thread, {core})


def start_native() -> None:
    """One small call on all threads of the native core."""
    accumulate(
        torch.ones(1, 4096),
        group_by_expert(torch.zeros(1, 1).long(), torch.ones(1, 1), 1),
        torch.zeros(1, 4096),
    )


def start_torch() -> None:
    """One product on all threads of torch."""
    torch.randn(512, 512) @ torch.randn(512, 512)


def reading(layer: Layer, inputs: Sequence[tuple[Tensor, Grouping]]) -> float:
    """Median seconds of one call over inputs."""
    times = []
    for x_TD, grouping in inputs:
        started = time.perf_counter()
        layer(x_TD, grouping)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def inputs_of(shape: LayerShape, tokens: int) -> list[tuple[Tensor, Grouping]]:
    """New tokens and routings for one reading."""
    made = []
    for _ in range(STEPS[tokens]):
        ids_TK = torch.rand(tokens, shape.experts).topk(shape.top_k).indices
        weights_TK = torch.full((tokens, shape.top_k), 1 / shape.top_k)
        made.append(
            (
                torch.randn(tokens, shape.hidden).bfloat16(),
                group_by_expert(ids_TK, weights_TK, shape.experts),
            )
        )
    return made


def measure(shape: LayerShape, codec: str, rounds: int, threads: int, pin: bool) -> list[Row]:
    """All rows of one shape and codec."""
    ours, nbytes = native_layer(shape, codec)
    layers = {"": ours} | {name: make(shape) for name, make in PEERS.get(codec, {}).items()}
    check_agreement(layers, shape)
    rows: list[Row] = []
    for work, tokens in WORK.items():
        times: dict[str, list[float]] = {name: [] for name in layers}
        shares: list[float] = []
        for layer in layers.values():  # warm
            reading(layer, inputs_of(shape, tokens)[:1])
        for _ in range(rounds):
            inputs = inputs_of(shape, tokens)
            before = measure_ram(threads, seconds=0.3)
            with pinned(pin):
                for name, layer in layers.items():
                    times[name].append(reading(layer, inputs))
            used = statistics.median(len(grouping.experts) for _, grouping in inputs)
            beside = Beside(before, measure_ram(threads, seconds=0.3))
            shares.append(beside.share(used * nbytes, times[""][-1]))
        decode = tokens <= 8
        label = f"{shape.name}, {codec}, {work}"
        milliseconds = {name: [1e3 * t for t in values] for name, values in times.items()}
        for peer in [name for name in layers if name] or [None]:
            rows.append(
                compare(
                    label,
                    "ms/layer",
                    milliseconds[""],
                    peer,
                    milliseconds[peer] if peer else (),
                    higher_is_better=False,
                    bound_shares=shares if decode else (),
                )
            )
        print(
            label, {k or "gangline": f"{statistics.median(v):.3f}" for k, v in milliseconds.items()}, end=" "
        )
        flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
        rate = f"{flops / statistics.median(times['']) / 1e9:.0f} GFLOP/s"
        print(f"share {statistics.median(shares):.2f}" if decode else rate, flush=True)
    return rows


def check_agreement(layers: dict[str, Layer], shape: LayerShape) -> None:
    """Every way must compute the same layer, up to the rounding of its format."""
    x_TD, grouping = inputs_of(shape, 8)[0]
    outputs = {name: layer(x_TD, grouping).float() for name, layer in layers.items()}
    for name, out_TD in outputs.items():
        error = float((out_TD - outputs[""]).norm() / outputs[""].norm())
        if error > 0.2:
            raise SystemExit(f"{name or 'gangline'} computes something else: relative difference {error:.2f}")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--pin", action="store_true", help="one core for each thread (Linux)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_native_threads(arguments.threads)
    if arguments.pin:
        pin_workers(start_native)
        pin_workers(start_torch)
    rows = [
        row
        for shape in SHAPES
        for codec in arguments.codecs.split(",")
        for row in measure(shape, codec, arguments.rounds, arguments.threads, arguments.pin)
    ]
    if arguments.out is not None:
        write_result(arguments.out.stem, rows, folder=arguments.out.parent)


if __name__ == "__main__":
    main()
