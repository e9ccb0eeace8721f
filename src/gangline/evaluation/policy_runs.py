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
from gangline.evaluation.prompts import TEXT
from gangline.evaluation.simulation import ModelParts, SimulationSettings
from gangline.evaluation.speed_run import timed_generation
from gangline.runtime.router_scores import router_scores
from gangline.traces import Trace, TraceWriter, open_trace
from gangline.traces.describe import describe_recording
from gangline.traces.hooks import observe
from gangline.traces.recorder import Recorder


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


def _run(model: Any, piece: Piece) -> tuple[float, float]:
    ids_1P, following_1N = torch.tensor([piece.prompt]), torch.tensor([piece.following])
    sample = timed_generation(model, ids_1P, len(piece.following), following_1N)
    return sample.prefill_seconds, sample.decode_seconds


@dataclass(frozen=True)
class LiveRun:
    """What the engine took for some pieces.

    Attributes:
        tokens: rows that went through the model, prompts included; ``decoded`` those of decoding passes.
        seconds, decode_seconds: of all, and of decoding.
        hits, misses: experts of events that had a slot or had none.
        bytes_read: from disk, whether asked for or ahead; ``bytes_ahead`` of them ahead.
        stall_seconds: time that computing waited for bytes.
    """

    tokens: int
    decoded: int
    seconds: float
    decode_seconds: float
    hits: int
    misses: int
    bytes_read: int
    bytes_ahead: int
    stall_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """All rows over all time."""
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float | None:
        """Share of hits."""
        seen = self.hits + self.misses
        return self.hits / seen if seen else None


def run_live(model: Any, pieces: Sequence[Piece]) -> LiveRun:
    """Run pieces one after another under the policy that the model has."""
    stats = model.gangline.store.stats
    before = stats.to_dict()
    times = [_run(model, piece) for piece in pieces]
    after = stats.to_dict()
    return LiveRun(
        tokens=sum(piece.tokens for piece in pieces),
        decoded=sum(len(piece.following) - 1 for piece in pieces),
        seconds=sum(map(sum, times)),
        decode_seconds=sum(decode for _, decode in times),
        hits=after["hits"] - before["hits"],
        misses=after["misses"] - before["misses"],
        bytes_read=after["total_bytes_read"] - before["total_bytes_read"],
        bytes_ahead=after["bytes_read"]["prefetch"] - before["bytes_read"]["prefetch"],
        stall_seconds=after["stall_seconds"] - before["stall_seconds"],
    )


def at_speed_of(run: LiveRun, settings: SimulationSettings, layers: int) -> SimulationSettings:
    """Return settings with the speeds of this machine as one live run shows them.

    The link is what the disk gave while somebody waited for it; where nobody did, it is fast enough not to
    matter. All computing counts as time between the MoE layers, of which there are ``layers``.
    """
    waited = run.stall_seconds > 0 and run.bytes_read > 0
    busy = max(run.seconds - run.stall_seconds, 1e-6)
    return replace(
        settings,
        link=run.bytes_read / run.stall_seconds if waited else 1e12,
        expert_seconds=0.0,
        layer_seconds=busy / run.tokens / layers,
    )


def model_parts(model: Any, network: Any = None, network_kind: str | None = None) -> ModelParts:
    """Return what simulated systems need of a loaded model."""
    embedding = model.get_input_embeddings()

    def embed(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            x_1TD: Tensor = embedding(torch.tensor([list(ids)]))
        return x_1TD[0].float()

    return ModelParts(router_scores(model.gangline.view), embed, network, network_kind)
