"""The same pieces of text under one policy after another: recorded, simulated and live.

A piece is a prompt with the tokens that follow it in the text, so that every run routes the same tokens
through the same passes, whatever the model would have said.

Shape suffixes: T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.core.errors import UsageError
from gangline.core.geometry import LayerGeometry
from gangline.evaluation.prompts import TEXT
from gangline.evaluation.simulation import ModelParts, SimulationSettings
from gangline.evaluation.speed_run import Sample, timed_generation
from gangline.runtime.router_scores import router_scores
from gangline.traces import Trace, TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.hooks import observe
from gangline.traces.recorder import Recorder
from gangline.traces.simulator import Line, SimMachine


@dataclass(frozen=True)
class Piece:
    """Token ids of a prompt and of what follows it."""

    source: str
    prompt: tuple[int, ...]
    following: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Rows that go through the model: the last following token does not."""
        return len(self.prompt) + len(self.following) - 1


def cut_pieces(
    tokenizer: Any | None, vocabulary: int, files: Sequence[Path], *, prompt: int, following: int, count: int
) -> list[Piece]:
    """Return ``count`` pieces, spread evenly over each of the texts.

    Args:
        tokenizer: None draws random ids.
        vocabulary: number of ids.
        files: texts; without any our own few sentences.
        prompt, following: tokens of each piece.
        count: pieces; they overlap only where the texts are too short.

    Raises:
        UsageError: a text cannot be read or is too short.
    """
    length = prompt + following
    if tokenizer is None:
        drawn = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
        return [_piece(f"random {n}", row, prompt) for n, row in enumerate(drawn.tolist())]
    texts = [(path.name, _read(path)) for path in files] or [("our own sentences", TEXT)]
    pieces = []
    for number, (name, text) in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < length + 1:
            raise UsageError(f"{name} has {len(ids)} tokens; give a text of more than {length}")
        mine = len(range(number, count, len(texts)))
        step = (len(ids) - length) // max(1, mine)
        for start in (n * step for n in range(mine)):
            pieces.append(_piece(f"{name}, tokens from {start}", ids[start : start + length], prompt))
    return pieces


def _piece(source: str, ids: Sequence[int], prompt: int) -> Piece:
    return Piece(source, tuple(ids[:prompt]), tuple(ids[prompt:]))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({error}); name a UTF-8 text file") from error


def record_pieces(
    model: Any, name: str, pieces: Sequence[Piece], folder: Path, *, tokenizer: Any = None, full: bool = True
) -> Trace:
    """Record the routing of pieces, prompt and one decoding pass per following token.

    Args:
        model: loaded or attached.
        name: what the trace calls it.
        pieces: to run.
        folder: of the trace.
        tokenizer: for the hashes.
        full: also logits and inputs of the routers, which some policies look at.
    """
    header = describe_recording(
        model,
        name,
        mode="full" if full else "ids",
        extras=("logits", "inputs") if full else (),
        source="generation",
        tokenizer=tokenizer,
        expert_bytes=[layout.nbytes for layout in model.gangline.catalog.layouts],
    )
    with TraceWriter(folder, header) as writer:
        recorder = Recorder(writer)
        with observe(model, recorder):
            for piece in pieces:
                with recorder.documents([piece.source]):
                    _run(model, piece)
    return open_trace(folder)


def _run(model: Any, piece: Piece) -> Sample:
    ids_1P, following_1N = torch.tensor([piece.prompt]), torch.tensor([piece.following])
    return timed_generation(model, ids_1P, len(piece.following), following_1N)


@dataclass(frozen=True)
class PhaseRun:
    """What the engine took for all passes of one phase.

    Attributes:
        passes: forward passes, and tokens: rows of all of them.
        seconds: of all; ``stall_seconds`` of them computing waited for bytes, and ``compute_seconds`` of them
            it computed leased experts.
        hits, misses: experts of events that had a slot or had none.
        bytes_read: from disk, whether asked for or ahead.
    """

    passes: int
    tokens: int
    seconds: float
    stall_seconds: float
    compute_seconds: float
    hits: int
    misses: int
    bytes_read: int

    @property
    def rows(self) -> float:
        """Tokens of one pass."""
        return self.tokens / self.passes

    @property
    def expert_seconds(self) -> float:
        """Computing one expert on its tokens."""
        return self.compute_seconds / max(1, self.hits + self.misses)

    @property
    def other_seconds(self) -> float:
        """Everything but experts and waiting, of one pass."""
        return max(0.0, self.seconds - self.stall_seconds - self.compute_seconds) / self.passes


@dataclass(frozen=True)
class LiveRun:
    """What the engine took for some pieces: for their prompts, and for decoding what follows.

    Attributes:
        prompt, decode: the two phases.
        bytes_ahead: bytes that were read ahead in both.
    """

    prompt: PhaseRun
    decode: PhaseRun
    bytes_ahead: int

    @property
    def hits(self) -> int:
        """Experts of events that had a slot."""
        return int(self._both("hits"))

    @property
    def misses(self) -> int:
        """Experts of events that had none."""
        return int(self._both("misses"))

    def _both(self, name: str) -> Any:
        return getattr(self.prompt, name) + getattr(self.decode, name)

    @property
    def tokens(self) -> int:
        """Rows that went through the model, prompts included."""
        return int(self._both("tokens"))

    @property
    def decoded(self) -> int:
        """Rows of decoding passes."""
        return self.decode.tokens

    @property
    def seconds(self) -> float:
        """Time of everything."""
        return float(self._both("seconds"))

    @property
    def bytes_read(self) -> int:
        """Bytes from disk, whether asked for or ahead."""
        return int(self._both("bytes_read"))

    @property
    def tokens_per_second(self) -> float:
        """All rows over all time."""
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float | None:
        """Share of experts of events that had a slot."""
        seen = self.hits + self.misses
        return self.hits / seen if seen else None


def run_live(model: Any, pieces: Sequence[Piece]) -> LiveRun:
    """Run pieces one after another under the policy that the model has."""
    stats = model.gangline.store.stats
    before = stats.to_dict()
    samples = [_run(model, piece) for piece in pieces]
    after = stats.to_dict()
    names = ("hits", "misses", "stall_seconds", "compute_seconds")
    decode = {name: sum(getattr(sample, name) for sample in samples) for name in (*names, "bytes_read")}
    whole = {name: after[name] - before[name] for name in names}
    whole["bytes_read"] = after["total_bytes_read"] - before["total_bytes_read"]
    decoded = sum(len(piece.following) - 1 for piece in pieces)
    return LiveRun(
        PhaseRun(
            passes=len(pieces),
            tokens=sum(len(piece.prompt) for piece in pieces),
            seconds=sum(sample.prefill_seconds for sample in samples),
            **{name: value - decode[name] for name, value in whole.items()},
        ),
        PhaseRun(decoded, decoded, sum(sample.decode_seconds for sample in samples), **decode),
        bytes_ahead=after["bytes_read"]["prefetch"] - before["bytes_read"]["prefetch"],
    )


def at_speed_of(
    run: LiveRun, settings: SimulationSettings, layers: Sequence[LayerGeometry]
) -> SimulationSettings:
    """Return settings with the speeds of this machine as one live run of the default shows them.

    The link is what the disk gave while a decoded token waited for it; where none did, it is fast enough not
    to matter. Computing costs a fixed part and one for each row, so that both phases take what they took.

    Args:
        run: without reading ahead while decoding.
        settings: to change.
        layers: the MoE layers.
    """
    prompt, decode = run.prompt, run.decode
    waited = decode.stall_seconds > 0 and decode.bytes_read > 0
    chosen = prompt.rows * sum(layer.top_k for layer in layers) * prompt.passes  # by all rows of prompts
    shared = chosen / max(1, prompt.hits + prompt.misses)
    machine = SimMachine(
        expert=_line(decode.expert_seconds, prompt.expert_seconds, shared),
        layer=_line(decode.other_seconds / len(layers), prompt.other_seconds / len(layers), prompt.rows),
    )
    link = decode.bytes_read / decode.stall_seconds if waited else 1e12
    return replace(settings, link=link, machine=machine)


def _line(one: float, many: float, rows: float) -> Line:
    """Return the line through the seconds of one row and of ``rows``; it never falls."""
    slope = max(0.0, many - one) / (rows - 1) if rows > 1 else 0.0
    slope = min(slope, one)  # the fixed part is not below zero
    return Line(one - slope, slope)


def model_parts(model: Any, network: Any = None, network_kind: str | None = None) -> ModelParts:
    """Return what simulated systems need of a loaded model."""
    embedding = model.get_input_embeddings()

    def embed(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            x_1TD: Tensor = embedding(torch.tensor([list(ids)]))
        return x_1TD[0].float()

    return ModelParts(router_scores(model.gangline.view), embed, network, network_kind)
