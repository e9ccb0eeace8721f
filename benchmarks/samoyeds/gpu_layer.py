"""Samoyeds experts on a GPU beside dense and 2:4 ones: MoE layers and single matrices, every token computed.

    python benchmarks/samoyeds/gpu_layer.py --out benchmarks/results/samoyeds_gpu_layer.json
    python benchmarks/samoyeds/gpu_layer.py --table src/gangline/kernels/cuda/samoyeds_times.json

Shapes are those of the models that the paper of Samoyeds (arXiv 2503.10725) measures, and OLMoE. Weights are
random; all experts have the same values at addresses of their own. Peers compute with the same weights:
torch's dense product and its 2:4 product, one expert after the other, and torch's grouped product. Each is
checked against the grouped product before it is timed. A reading is one CUDA graph replay between two events,
with the L2 cache overwritten before it; what cannot be captured is timed as it is, and says so. The routing
is part of what is timed for us and for the grouped product; the others get it for nothing.

The bound is the larger of two times: the bytes of the experts in use over the bandwidth of a copy, and the
sparse operations over twice the rate of a dense product, both measured at the start.

Shape suffixes: T tokens, K experts per token, P pairs, N pairs of one expert, D hidden, F intermediate,
G gate/up columns, E experts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear, silu

from gangline.benchmarks.result import Row, compare, write_result
from gangline.core.errors import GanglineError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats.registry import sparse_codec
from gangline.formats.samoyeds_arrays import prune_magnitude
from gangline.kernels.cuda.choice import SamoyedsLayer
from gangline.kernels.cuda.measured import Timing
from gangline.kernels.cuda.routing import route_on_device
from gangline.kernels.cuda.tiles import choose_tile
from gangline.kernels.grouping import group_by_expert
from gangline.kernels.reference import ExpertMath


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer without its shared experts."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


SHAPES = (
    LayerShape("Mixtral-8x7B", 4096, 14336, 8, 2),
    LayerShape("Qwen2-MoE-A2.7B", 2048, 1408, 60, 4),
    LayerShape("DeepSeek-MoE-16B", 2048, 1408, 64, 6),
    LayerShape("OLMoE-1B-7B", 2048, 1024, 64, 8),
    LayerShape("MiniCPM-MoE-8x2B", 2304, 5760, 8, 2),
    LayerShape("Mixtral-8x22B", 6144, 16384, 8, 2),
)
TOKENS = (1, 16, 1024, 4096, 4, 64, 256)
CODECS = {"samoyeds:1:2:128/bf16": 4096, "samoyeds:1:2:128/int4g64": 64}
READINGS = 15
DEVICE = "cuda"
FLUSH_BYTES = 256 << 20
TOLERANCE = 2e-2


class WrongResult(Exception):
    """A kernel is missing or computes something else than its peers."""


def swiglu(h_PG: Tensor) -> Tensor:
    """The gate of all shapes."""
    gate_PF, up_PF = h_PG.chunk(2, dim=-1)
    return silu(gate_PF) * up_PF


class Clock:
    """Microseconds of GPU work, with a cold L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)

    def __call__(self, work: Callable[[], object], *, capture: bool = True) -> tuple[list[float], bool]:
        """Readings, and whether they are graph replays."""
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        run, captured = (self._captured(work), True) if capture else (work, False)
        times = [self._once(run) for _ in range(READINGS if capture else 3)]
        return times, captured

    def _captured(self, work: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _once(self, run: Callable[[], object]) -> float:
        self._flush.fill_(1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end)


@dataclass(frozen=True)
class Limits:
    """What the GPU reached in this run: bytes/s of a copy, dense bf16 operations/s."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls, clock: Clock) -> "Limits":
        """One copy of 2 GiB and one product of 8192^3."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        copy_us, _ = clock(lambda: target.copy_(source))
        product_us, _ = clock(lambda: a @ b)
        seconds = (1e-6 * statistics.median(us) for us in (copy_us, product_us))
        return cls(2 * source.numel() / next(seconds), 2 * 8192**3 / next(seconds))

    def bound_us(self, nbytes: float, operations: float) -> float:
        """The least time for so many bytes and sparse operations (counted with the zeros of 2:4)."""
        return 1e6 * max(nbytes / self.bandwidth, operations / (2 * self.rate))


class Layer:
    """One layer's weights in every form, and its routing for one number of tokens."""

    def __init__(self, shape: LayerShape, codec: str) -> None:
        self.shape, self.codec = shape, codec
        sizes = {
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        found = sparse_codec(codec)
        fields, raws, dense = [], [], []
        for name, size in sizes.items():
            weight = torch.randn(size, device=DEVICE, dtype=torch.bfloat16) / size[1] ** 0.5
            raw = found.encode(prune_magnitude(weight, found.pattern))
            fields.append(FieldSpec(name, size, codec, found.nbytes(size)))
            raws.append(raw.repeat(shape.experts, 1))
            dense.append(found.decode(raw, size, torch.bfloat16).repeat(shape.experts, 1, 1))
        self.gate_up_EGD, self.down_EDF = dense
        self.expert_bytes = sum(spec.nbytes for spec in fields)
        of_experts = [tuple(raw[expert] for raw in raws) for expert in range(shape.experts)]
        self.ours = SamoyedsLayer(ExpertLayout(tuple(fields)), ExpertMath(swiglu), of_experts, timings=())
        if self.ours.sparse is None:
            raise WrongResult(f"no GPU kernel: {self.ours.reason}")
        kernel = self.ours.sparse
        self.table = kernel.table([kernel.bind(raw) for raw in of_experts])
        self.semi_EGD = [_semi_structured(w) for w in self.gate_up_EGD]
        self.semi_EDF = [_semi_structured(w) for w in self.down_EDF]

    def route(self, tokens: int) -> None:
        """Draw tokens and a balanced random routing."""
        shape = self.shape
        self.x_TD = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
        self.ids_TK = torch.rand(tokens, shape.experts, device=DEVICE).argsort(dim=-1)[:, : shape.top_k]
        self.weights_TK = torch.rand(tokens, shape.top_k, device=DEVICE)
        self.grouping = group_by_expert(self.ids_TK, self.weights_TK, shape.experts)

    def sparse(self) -> Tensor:
        """Our kernels."""
        assert self.ours.sparse is not None
        return self.ours.sparse.forward(self.x_TD, self.ids_TK, self.weights_TK, self.table)

    def wide(self) -> Tensor:
        """Our Hopper kernel."""
        assert self.ours.sparse is not None
        return self.ours.sparse.forward(self.x_TD, self.ids_TK, self.weights_TK, self.table, wide=True)

    def grouped(self) -> Tensor:
        """torch's grouped product over the dense weights."""
        routing = route_on_device(self.ids_TK, self.weights_TK, self.shape.experts)
        ends = routing.starts[1:]
        h_PG = _grouped_mm(self.x_TD[routing.token_P], self.gate_up_EGD.transpose(1, 2), ends)
        y_PD = _grouped_mm(swiglu(h_PG), self.down_EDF.transpose(1, 2), ends)
        y_TKD = y_PD[routing.pair_TK].float() * routing.weight_TK[..., None]
        return y_TKD.sum(dim=1).to(torch.bfloat16)

    def by_expert(self, gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> Tensor:
        """One expert after the other, with dense or 2:4 matrices."""
        out_TD = torch.zeros(self.x_TD.shape, device=DEVICE)
        for index, expert in enumerate(self.grouping.experts):
            x_ND = self.x_TD[self.grouping.tokens(index)]
            y_ND = linear(swiglu(linear(x_ND, gate_up[expert])), down[expert])
            self.grouping.add(index, y_ND, out_TD)
        return out_TD.to(torch.bfloat16)

    def decoded(self) -> Tensor:
        """What the dispatcher does where the sparse kernel is not chosen."""
        return self.ours.dense(self.x_TD, self.ids_TK, self.weights_TK)

    def bound_us(self, limits: Limits) -> float:
        """The least time of the sparse layer."""
        shape, used = self.shape, len(self.grouping.experts)
        pairs = len(self.grouping.token_P)
        # Half of the rows are there, and 2:4 instructions count four columns where two are kept.
        operations = 2 * pairs * 3 * shape.hidden * shape.intermediate / 2
        return limits.bound_us(used * self.expert_bytes, operations)


def layer_rows(layer: Layer, clock: Clock, limits: Limits) -> tuple[list[Row], Timing]:
    """Rows of one layer and number of tokens, and its entry for the dispatcher's table."""
    shape = layer.shape
    peers: dict[str, Callable[[], Tensor]] = {
        "torch grouped_mm, dense bf16": layer.grouped,
        "torch dense bf16, expert by expert": lambda: layer.by_expert(layer.gate_up_EGD, layer.down_EDF),
        "torch 2:4 semi-structured, expert by expert": lambda: layer.by_expert(
            layer.semi_EGD, layer.semi_EDF
        ),
    }
    kernels: dict[str, Callable[[], Tensor]] = {"mma.sp": layer.sparse}
    if layer.ours.sparse is not None and layer.ours.sparse.wide is not None:
        kernels["wgmma"] = layer.wide
    want = layer.grouped().float()
    for name, run in {**kernels, **peers}.items():
        error = float((run().float() - want).norm() / want.norm())
        if not error < TOLERANCE:
            raise WrongResult(f"{name}: relative error {error:.2g}")
    ours = {name: clock(run)[0] for name, run in kernels.items()}
    of_peers = {name: _readings(clock, run) for name, run in peers.items()}
    rows = []
    for kernel, times in ours.items():
        work = f"{shape.name} {layer.codec}, {len(layer.x_TD)} tokens, layer, {kernel}"
        shares = [layer.bound_us(limits) / statistics.median(times)] * len(times)
        for name, (readings, captured) in of_peers.items():
            peer = name if captured else f"{name} (no CUDA graph)"
            rows.append(
                compare(work, "us", times, peer, readings, higher_is_better=False, bound_shares=shares)
            )
    dense_us, _ = clock(layer.decoded, capture=False)
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.top_k, len(layer.x_TD))
    medians = (statistics.median(ours["mma.sp"]), statistics.median(dense_us))
    wide = statistics.median(ours["wgmma"]) if "wgmma" in ours else None
    return rows, Timing(torch.cuda.get_device_name(), layer.codec, *sizes, *medians, wide)


def matrix_rows(layer: Layer, clock: Clock, limits: Limits) -> Iterator[Row]:
    """Rows of one expert's down matrix with the layer's tokens: the kernel alone."""
    kernel = layer.ours.sparse
    assert kernel is not None
    tokens, shape = len(layer.x_TD), layer.shape
    h_TF = torch.randn(tokens, shape.intermediate, device=DEVICE, dtype=torch.bfloat16)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    tile, table = choose_tile(tokens, tokens, 1), layer.table.down_E24[:1].contiguous()
    y_STD = torch.empty(kernel.down.splits(tokens, 1, tile), tokens, shape.hidden, device=DEVICE)

    def product() -> Tensor:
        kernel.down(table, starts, None, h_TF, y_STD, tile)
        return y_STD[0] if len(y_STD) == 1 else y_STD.sum(0)

    ours, _ = clock(product)
    nbytes = kernel.down.shape.codec.nbytes((shape.hidden, shape.intermediate))
    bound = limits.bound_us(nbytes, tokens * shape.hidden * shape.intermediate)
    peers: dict[str, Callable[[], Tensor]] = {
        "torch dense bf16": lambda: linear(h_TF, layer.down_EDF[0]),
        "torch 2:4 semi-structured": lambda: linear(h_TF, layer.semi_EDF[0]),
    }
    work = f"{shape.name} {layer.codec}, {tokens} tokens, down matrix"
    for name, run in peers.items():
        readings, captured = _readings(clock, run)
        shares = [bound / statistics.median(ours)] * len(ours)
        peer = name if captured else f"{name} (no CUDA graph)"
        yield compare(work, "us", ours, peer, readings, higher_is_better=False, bound_shares=shares)


def _readings(clock: Clock, run: Callable[[], object]) -> tuple[list[float], bool]:
    try:
        return clock(run)
    except RuntimeError:
        # Some products allocate or ask the host while they run: timed as they are.
        torch.cuda.synchronize()
        return clock(run, capture=False)


def _semi_structured(w: Tensor) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(w)


def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    return grouped_mm(x, w, offs=ends)


@dataclass
class Measured:
    """What one run found.

    Attributes:
        rows: for the result.
        timings: for the dispatcher's table.
        left: what there was no time for.
        failed: what went wrong, in words; the rest was measured all the same.
    """

    rows: list[Row] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def measure(shapes: tuple[LayerShape, ...], seconds: float) -> Measured:
    """Measure all shapes; one that fails is named and passed over."""
    start, clock, found = time.monotonic(), Clock(), Measured()
    limits = Limits.measure(clock)
    for shape in shapes:
        for codec, most in CODECS.items():
            name = f"{shape.name} {codec}"
            if time.monotonic() - start > seconds:
                found.left.append(name)
                continue
            try:
                layer = Layer(shape, codec)
            except (GanglineError, WrongResult, RuntimeError) as error:
                found.failed.append(f"{name}: {error}")
                continue
            for tokens in (tokens for tokens in TOKENS if tokens <= most):
                if time.monotonic() - start > seconds:
                    found.left.append(f"{name}, {tokens} tokens")
                    continue
                _measure_tokens(layer, tokens, clock, limits, found)
            del layer
            torch.cuda.empty_cache()
    return found


def _measure_tokens(layer: Layer, tokens: int, clock: Clock, limits: Limits, found: Measured) -> None:
    try:
        layer.route(tokens)
        of_layer, timing = layer_rows(layer, clock, limits)
        found.rows += [*of_layer, *matrix_rows(layer, clock, limits)]
        found.timings.append(timing)
        _show(found.rows[-len(of_layer) - 2 :])
    except (GanglineError, WrongResult, RuntimeError) as error:
        found.failed.append(f"{layer.shape.name} {layer.codec}, {tokens} tokens: {error}")
        print(found.failed[-1])


def _show(rows: list[Row]) -> None:
    for row in rows:
        share = 0.0 if row.bound_share is None else row.bound_share
        print(f"{row.work}: {row.ours:.1f} us, {share:.0%} of the bound; {row.ratio:.2f}x of {row.peer}")


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="name of a shape; all by default")
    parser.add_argument("--seconds", type=float, default=1800, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/samoyeds_gpu_layer.json"))
    parser.add_argument("--table", type=Path, help="write the dispatcher's table here")
    arguments = parser.parse_args()
    shapes = tuple(s for s in SHAPES if not arguments.shape or s.name in arguments.shape)
    torch.manual_seed(0)
    found = measure(shapes, arguments.seconds)
    about = {"left_out": found.left, "failed": found.failed}
    if found.rows:
        write_result(arguments.out.stem, found.rows, folder=arguments.out.parent, machine=about)
    if arguments.table:
        entries = [asdict(entry) for entry in found.timings]
        arguments.table.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"{len(found.rows)} rows in {arguments.out}; no time for: {', '.join(found.left) or 'nothing'}")
    if found.failed:
        raise SystemExit("failed: " + "; ".join(found.failed))


if __name__ == "__main__":
    main()
