"""What ``bench`` measured."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A quantity over repetitions."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one or more values."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Bound:
    """What the machine's bandwidths allow for decoding.

    A token must at least read its missing experts from disk, and its dense weights and active experts from
    memory; the slower of the two is the limit, as if they overlapped perfectly and computing were free.

    Bandwidths are the best of many short windows (see ``runtime.best_bandwidth``): the most that the machine
    showed, not a mean.

    Attributes:
        limit: ``"disk"`` or ``"memory"``, whichever takes longer.
        disk_bytes: read from disk per decoded token.
        memory_bytes: read from memory per decoded token.
        disk_bandwidth: bytes/s, the most seen right before and right after all runs.
        disk_way: how the disk was read in that window.
        memory_bandwidth: bytes/s, the most seen around and between the runs.
        tokens_per_second: the bound with these bandwidths.
        share: median over the runs of speed as a share of the bound. Each run is judged by the memory
            bandwidth right before and right after it, which drifts over minutes, and by the best of the disk.
        shares: the same with its spread.
    """

    limit: str
    disk_bytes: float
    memory_bytes: float
    disk_bandwidth: float
    disk_way: str
    memory_bandwidth: float
    tokens_per_second: float
    share: float
    shares: Spread


@dataclass(frozen=True)
class PeerSpeed:
    """Another engine on the same weights, in turns with ours.

    Attributes:
        name: of the engine.
        version: of its package.
        weights: what it computes with, in words.
        prefill: its tokens/s.
        decode: the same of decoding.
        prefill_ratio: ours divided by its, round by round; above 1 ours is faster.
        decode_ratio: the same of decoding.
        decode_share: its share of what memory bandwidth allows for the weights that it reads, round by round;
            None where they are not counted.
    """

    name: str
    version: str
    weights: str
    prefill: Spread
    decode: Spread
    prefill_ratio: Spread
    decode_ratio: Spread
    decode_share: Spread | None = None


@dataclass(frozen=True)
class SpeedReport:
    """Speed and memory of one model under one budget.

    Attributes:
        model: as the user named it.
        banner: precision, dtype and share of experts in memory, in words.
        prompt_tokens: length of each prompt.
        new_tokens: tokens decoded after it.
        batch: sequences decoded at once.
        text: ``"text"`` if prompts are text and continuations sampled (beside a peer: text as well),
            ``"random"`` if all token ids were drawn at random (models without a tokenizer).
        routing: ``"own"``, or in words which trace replaced it.
        prefill: tokens/s of reading the prompt.
        decode: tokens/s of the continuation.
        first_token_seconds: from the prompt to the first token.
        memory: the budget in bytes, or None.
        peak_resident_bytes: largest resident memory of the process in its life (VmHWM).
        hit_rate: share of experts that an event found in each tier while decoding; None before any event.
        miss_bytes_per_token: read from disk per decoded token.
        bound: what bandwidth allows.
        peers: other engines on the same weights.
        together: beside peers: whether all stayed loaded, or were loaded in turns.
        kind: always ``"measured"``.
    """

    model: str
    banner: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    text: str
    routing: str
    prefill: Spread
    decode: Spread
    first_token_seconds: Spread
    memory: int | None
    peak_resident_bytes: int | None
    hit_rate: dict[str, float | None]
    miss_bytes_per_token: float
    bound: Bound
    peers: tuple[PeerSpeed, ...] = ()
    together: bool | None = None
    kind: str = "measured"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
