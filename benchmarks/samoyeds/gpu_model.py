"""Whole models on a GPU with Samoyeds experts beside transformers with dense ones: speed, and how many fit.

    python benchmarks/samoyeds/gpu_model.py --out benchmarks/results/samoyeds_gpu_model.json
    python benchmarks/samoyeds/gpu_model.py --device cpu --shape tiny-olmoe --codec samoyeds:1:2:32/bf16

The models have random weights of well-known shapes and are transformers' own on every side, attention and
router included; only the experts differ: transformers' eager loop over experts, its grouped product (its
default), and ours. The dense experts hold what the sparse bf16 ones decode to, so both models are the same
function, and the difference of their logits is checked. All experts of a model have the same values, each
at addresses of its own.

Decoding continues a prompt of 512 tokens, one token a sequence and step; once as ``generate`` does it, the
host starting every kernel, and once as a CUDA graph of a step, where a side can be captured (a loop over the
experts in use cannot). A prompt is one forward pass. Sides take turns in every round.

The largest batch is the largest number of sequences of 1024 tokens of which one forward pass and one more
token succeed while torch may allocate ``--fit-gib``, to a sixteenth; only the experts of that side are there.

The bound of a step: the bytes of the dense weights and of the experts that so many tokens are expected to
use, over the bandwidth of a copy in the same run.

Shape suffixes: S sequences, T tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_layer import Clock, Limits
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.initialization import no_init_weights

from gangline.benchmarks.largest import largest
from gangline.benchmarks.random_checkpoint import weight_std
from gangline.benchmarks.result import Row, compare, write_result
from gangline.benchmarks.shapes import shape_config
from gangline.core.errors import GanglineError
from gangline.core.layout import ExpertLayout, FieldSpec
from gangline.formats.registry import sparse_codec
from gangline.formats.samoyeds_arrays import prune_magnitude
from gangline.kernels.cuda.choice import SamoyedsLayer
from gangline.kernels.cuda.measured import Timing
from gangline.models import (
    MoEBlock,
    MoEView,
    drop_expert_params,
    expert_math,
    expert_tensors,
    find_moe,
    install,
)
from gangline.models.view import ExpertsForward

SHAPES = ("olmoe-1b-7b", "qwen3-30b-a3b:16", "mixtral-8x7b:8", "deepseek-v2-lite:14")
CODECS = ("samoyeds:1:2:128/bf16", "samoyeds:1:2:128/int4g64")
STEPS = 8
FIT_PROMPT = 1024
FIT_MOST = 1024
# Of the logits, half of them: bf16 in another order, and what a router then decides otherwise.
TOLERANCE = 0.1
PEERS = {"transformers eager": "eager", "transformers grouped_mm": "grouped_mm"}


class WrongResult(Exception):
    """A side computes something else than the others."""


@dataclass(frozen=True)
class Side:
    """One way to compute the experts.

    Attributes:
        name: for the rows.
        implementation: transformers' name of its own; None for ours.
        codec: of our experts.
        forwards: our layers.
    """

    name: str
    implementation: str | None = None
    codec: str | None = None
    forwards: tuple[ExpertsForward, ...] = ()


class Subject:
    """One model and its sides."""

    def __init__(self, spec: str, codecs: list[str], device: torch.device) -> None:
        self.spec, self.device = spec, device
        with device, no_init_weights():
            model = AutoModelForCausalLM.from_config(shape_config(spec), dtype=torch.bfloat16)
        self.model: PreTrainedModel = model.eval()
        self.view: MoEView = find_moe(self.model)
        self.raws = {codec: draw_expert(self.view.blocks[0], codec, device) for codec in codecs}
        self._fill(codecs[0])

    def _fill(self, codec: str) -> None:
        """Give every weight its value; the dense experts are those of ``codec``."""
        for name, weight in self.model.named_parameters():
            std = weight_std(name, tuple(weight.shape))
            if std is None:
                weight.data.fill_(1.0)
            elif not of_expert(name):
                weight.data.normal_(0.0, std)
        found = sparse_codec(codec)
        for block in self.view.blocks:
            matrices = [
                found.decode(raw, spec.shape, torch.bfloat16)
                for raw, spec in zip(self.raws[codec], block.fields, strict=True)
            ]
            for expert in range(block.geometry.experts):
                for target, matrix in zip(expert_tensors(block, expert), matrices, strict=True):
                    target.data.copy_(matrix)

    def ours(self, codec: str, timings: tuple[Timing, ...]) -> Side:
        """Sparse experts of every layer, computed as ``timings`` say; without any by the sparse kernel."""
        forwards = []
        for block in self.view.blocks:
            experts = block.geometry.experts
            copies = [raw.repeat(experts, 1) for raw in self.raws[codec]]
            of_experts = [tuple(raw[expert] for raw in copies) for expert in range(experts)]
            layer = SamoyedsLayer(layout_of(block, codec), expert_math(block), of_experts, timings=timings)
            if layer.sparse is None and self.device.type == "cuda":
                raise WrongResult(f"{self.spec} {codec}: no GPU kernel: {layer.reason}")
            forwards.append(forward_of(layer, of_experts, chosen=bool(timings)))
        return Side(f"gangline {codec}", codec=codec, forwards=tuple(forwards))

    @contextmanager
    def using(self, side: Side) -> Iterator[None]:
        """Let the model compute its experts so while the block runs."""
        if side.implementation is not None:
            self.model.set_experts_implementation(side.implementation)
            yield
            return
        undo = [
            install(block, forward) for block, forward in zip(self.view.blocks, side.forwards, strict=True)
        ]
        try:
            yield
        finally:
            for one in reversed(undo):
                one()

    def step_bytes(self, side: Side, sequences: int) -> float:
        """Bytes of weights that one step must read."""
        experts = sum(block.geometry.experts for block in self.view.blocks)
        geometry = self.view.blocks[0].geometry
        used = experts * (1 - (1 - geometry.top_k / geometry.experts) ** sequences)
        dense = sum(w.numel() for name, w in self.model.named_parameters() if read_always(name))
        return 2 * dense + used * self.expert_bytes(side)

    def expert_bytes(self, side: Side) -> int:
        """Bytes of one expert."""
        if side.codec is not None:
            return sum(raw.numel() for raw in self.raws[side.codec])
        return 2 * sum(spec.shape[0] * spec.shape[1] for spec in self.view.blocks[0].fields)


def of_expert(name: str) -> bool:
    """Whether the weight is of an expert that a router chooses."""
    return ".experts." in name and "shared_experts" not in name


def read_always(name: str) -> bool:
    """Whether a step reads the whole weight; of the embedding it reads a row."""
    return not of_expert(name) and "embed_tokens" not in name


def layout_of(block: MoEBlock, codec: str) -> ExpertLayout:
    """The layout of one sparse expert."""
    found = sparse_codec(codec)
    return ExpertLayout(
        tuple(FieldSpec(spec.name, spec.shape, codec, found.nbytes(spec.shape)) for spec in block.fields)
    )


def draw_expert(block: MoEBlock, codec: str, device: torch.device) -> tuple[Tensor, ...]:
    """Bytes of one pruned expert, a tensor a matrix; the same values for every codec of a pattern."""
    found = sparse_codec(codec)
    torch.manual_seed(0)
    raws = []
    for spec in block.fields:
        weight = torch.randn(spec.shape, device=device, dtype=torch.bfloat16) / spec.shape[1] ** 0.5
        raws.append(found.encode(prune_magnitude(weight, found.pattern)))
    return tuple(raws)


def forward_of(layer: SamoyedsLayer, of_experts: list[tuple[Tensor, ...]], *, chosen: bool) -> ExpertsForward:
    """Compute a layer by what the table of measured times says, or always by the sparse kernel."""
    kernel = layer.sparse
    if chosen or kernel is None:
        return lambda x_TD, ids_TK, weights_TK: layer(x_TD, ids_TK, weights_TK.float())
    table = kernel.table([kernel.bind(raw) for raw in of_experts])
    return lambda x_TD, ids_TK, weights_TK: kernel.forward(x_TD, ids_TK, weights_TK.float(), table)


class Stopwatch:
    """Seconds as the host sees them, all work on the device done."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of one run."""
        self._settle()
        start = time.perf_counter()
        run()
        self._settle()
        return time.perf_counter() - start

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


@dataclass
class Decoding:
    """Steps behind a prompt, on one side.

    Attributes:
        seconds: of a step as ``generate`` starts it, one a round.
        replayed: of a captured step; empty where it cannot be captured.
        prompt: seconds of the prompt.
    """

    seconds: list[float] = field(default_factory=list)
    replayed: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)


class Sequences:
    """So many sequences of one model, with a cache for every side."""

    def __init__(self, subject: Subject, count: int, stopwatch: Stopwatch, prompt: int) -> None:
        self._subject, self._stopwatch = subject, stopwatch
        vocabulary = subject.model.config.vocab_size
        self.prompt_ST = torch.randint(vocabulary, (count, prompt), device=subject.device)
        self.next_S1 = torch.randint(vocabulary, (count, 1), device=subject.device)
        self.cache: DynamicCache = self.start()[1]

    def start(self) -> tuple[Tensor, DynamicCache]:
        """Logits of the last prompt token, and the cache."""
        cache = DynamicCache(config=self._subject.model.config)
        out = self._subject.model(self.prompt_ST, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float(), cache

    def step(self, cache: DynamicCache) -> Tensor:
        """One more token of every sequence."""
        out = self._subject.model(self.next_S1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    def seconds_of_steps(self) -> float:
        """Of one of several steps that follow each other."""
        cache = copy.deepcopy(self.cache)

        def steps() -> None:
            for _ in range(STEPS):
                self.step(cache)

        return self._stopwatch(steps) / STEPS

    def captured(self) -> Callable[[], object] | None:
        """A step as a CUDA graph; None where the host takes part in it."""
        if self._subject.device.type != "cuda":
            return None
        cache, graph = copy.deepcopy(self.cache), torch.cuda.CUDAGraph()
        kept = copy.deepcopy(self.cache)  # what the replays read: a step puts longer tensors in its place
        inputs = [(layer.keys, layer.values) for layer in kept.layers]
        try:
            self.step(cache)
            with torch.cuda.graph(graph):
                self.step(kept)
        except RuntimeError:
            torch.cuda.synchronize()
            return None

        def replay(_inputs: object = inputs) -> None:
            graph.replay()

        return replay


def measure_speed(
    subject: Subject, sides: list[Side], count: int, prompt: int, rounds: int
) -> dict[str, Decoding]:
    """Prompts and steps of all sides, in turns."""
    stopwatch = Stopwatch(subject.device)
    batch = Sequences(subject, count, stopwatch, prompt)
    found = {side.name: Decoding() for side in sides}
    for index in range(rounds + 1):  # the first warms up
        for side in sides:
            with subject.using(side):
                of_prompt, of_step = stopwatch(batch.start), batch.seconds_of_steps()
            if index:
                found[side.name].prompt.append(of_prompt)
                found[side.name].seconds.append(of_step)
    replays = {}
    for side in sides:
        with subject.using(side):
            replays[side.name] = batch.captured()
    for _ in range(rounds):
        for name, replay in replays.items():
            if replay is not None:
                found[name].replayed.append(stopwatch(replay))
    return found


def check_logits(subject: Subject, sides: list[Side], prompt: int) -> dict[str, float]:
    """The median relative difference of each side's logits from those of the first.

    Raises:
        WrongResult: a side with the same weights computes something else.
    """
    batch = Sequences(subject, 2, Stopwatch(subject.device), prompt)
    logits, errors = {}, {}
    for side in sides:
        with subject.using(side):
            logits[side.name] = batch.start()[0]
    want = logits[sides[0].name]
    for side in sides[1:]:
        difference_S = (logits[side.name] - want).norm(dim=-1) / want.norm(dim=-1)
        errors[side.name] = float(difference_S.median())
        same_weights = side.codec is None or side.codec.endswith("/bf16")
        if same_weights and not errors[side.name] < TOLERANCE:
            raise WrongResult(f"{subject.spec}, {side.name}: relative difference {errors[side.name]:.2g}")
    return errors


def speed_rows(
    subject: Subject,
    found: dict[str, Decoding],
    sides: list[Side],
    batch: tuple[int, int],
    bandwidth: float | None,
) -> Iterator[Row]:
    """Ours beside each peer; ``batch``: sequences and the length of their prompts."""
    count, prompt = batch
    for side in (side for side in sides if side.codec is not None):
        mine = found[side.name]
        least = None if bandwidth is None else subject.step_bytes(side, count) / bandwidth
        for peer in (peer for peer in sides if peer.implementation is not None):
            other = found[peer.name]
            replayed = other.replayed or other.seconds
            replayed_name = peer.name if other.replayed else f"{peer.name} (no CUDA graph)"
            for work, ours, theirs, name, tokens in (
                (f"prompts of {prompt}", mine.prompt, other.prompt, peer.name, count * prompt),
                ("decode", mine.seconds, other.seconds, peer.name, count),
                ("decode, CUDA graph", mine.replayed, replayed, replayed_name, count),
            ):
                if not ours:
                    continue
                yield compare(
                    f"{subject.spec}, {side.codec}, {count} sequences, {work}",
                    "tokens/s",
                    [tokens / one for one in ours],
                    name,
                    [tokens / one for one in theirs],
                    bound_shares=[least / one for one in ours] if least and "decode" in work else (),
                )


def fits(subject: Subject, side: Side, count: int) -> bool:
    """Whether so many sequences of ``FIT_PROMPT`` tokens and one token more succeed."""
    try:
        with subject.using(side):
            batch = Sequences(subject, count, Stopwatch(subject.device), FIT_PROMPT)
            batch.step(batch.cache)
            torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def fit_rows(
    subject: Subject, peers: list[Side], codecs: list[str], timings: tuple[Timing, ...], gib: float
) -> Iterator[Row]:
    """The largest batch of every side, alone within so many GiB; the dense experts are gone afterwards."""
    total = torch.cuda.get_device_properties(subject.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), subject.device)

    def most_of(side: Side) -> int:
        def works(count: int) -> bool:
            release_memory()
            return fits(subject, side, count)

        return largest(works, FIT_MOST)

    try:
        found = {peer.name: most_of(peer) for peer in peers}
        for block in subject.view.blocks:
            drop_expert_params(block)
        for codec in codecs:
            release_memory()
            ours = most_of(subject.ours(codec, timings))
            for name, theirs in found.items():
                work = f"{subject.spec}, {codec}, batch of {FIT_PROMPT} tokens each in {gib:g} GiB"
                yield Row(work, "sequences", ours, name, theirs, ours / theirs if theirs else None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, subject.device)


def release_memory() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_model(
    spec: str, arguments: argparse.Namespace, timings: tuple[Timing, ...], late: Callable[[], bool]
) -> tuple[list[Row], dict[str, float]]:
    """Rows of one model, and how far the sides' logits are apart."""
    device = torch.device(arguments.device)
    bandwidth = Limits.measure(Clock()).bandwidth if device.type == "cuda" else None
    subject = Subject(spec, arguments.codec, device)
    peers = [Side(name, implementation) for name, implementation in PEERS.items()]
    sides = peers + [subject.ours(codec, timings) for codec in arguments.codec]
    errors = check_logits(subject, sides, arguments.prompt)
    rows: list[Row] = []
    for count in arguments.sequences:
        if late():
            print(f"{spec}: no time for {count} sequences")
            continue
        found = measure_speed(subject, sides, count, arguments.prompt, arguments.rounds)
        rows += speed_rows(subject, found, sides, (count, arguments.prompt), bandwidth)
    del sides
    if device.type == "cuda" and not late():
        rows += fit_rows(subject, peers, arguments.codec, timings, arguments.fit_gib)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x of {row.peer}"
        print(f"{row.work}: {row.ours:.1f} {row.metric}; {ratio}", flush=True)
    return rows, errors


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", action="append", help=f"name[:layers] of a shape; by default {', '.join(SHAPES)}")
    add("--codec", action="append", help="sparse codecs, the one that the dense experts decode first")
    add("--sequences", type=int, nargs="+", default=[1, 16])
    add("--prompt", type=int, default=512, help="tokens before decoding")
    add("--rounds", type=int, default=7)
    add("--fit-gib", type=float, default=24.0, help="what torch may allocate for the largest batch")
    add("--times", type=Path, nargs="*", default=[], help="tables of gpu_layer.py: compute as they say")
    add("--seconds", type=float, default=1800, help="begin nothing new after so long")
    add("--device", default="cuda")
    add("--out", type=Path)
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or list(SHAPES)
    arguments.codec = arguments.codec or list(CODECS)
    return arguments


@torch.inference_mode()
def main() -> None:
    """Measure and store; a model that fails is named and passed over."""
    arguments = parse_arguments()
    start = time.monotonic()
    timings = tuple(Timing(**entry) for path in arguments.times for entry in json.loads(path.read_text()))
    rows: list[Row] = []
    errors: dict[str, dict[str, float]] = {}
    failed = []
    for spec in arguments.shape:
        if time.monotonic() - start > arguments.seconds:
            failed.append(f"{spec}: no time left")
            continue
        try:
            torch.manual_seed(0)
            found, errors[spec] = measure_model(
                spec, arguments, timings, lambda: time.monotonic() - start > arguments.seconds
            )
            rows += found
        except (GanglineError, WrongResult, RuntimeError) as error:
            failed.append(f"{spec}: {error}")
        release_memory()
    if arguments.out and rows:
        about = {"failed": failed, "logit_differences": errors}
        write_result(arguments.out.stem, rows, folder=arguments.out.parent, machine=about)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
