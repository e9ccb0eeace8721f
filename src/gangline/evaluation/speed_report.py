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

    Attributes:
        limit: ``"disk"`` or ``"memory"``, whichever takes longer.
        disk_bytes: read from disk per decoded token.
        memory_bytes: read from memory per decoded token.
        disk_bandwidth: bytes/s, mean of a measurement right before and right after the run.
        memory_bandwidth: the same of memory.
        tokens_per_second: the bound.
        share: measured median as a share of it.
    """

    limit: str
    disk_bytes: float
    memory_bytes: float
    disk_bandwidth: float
    memory_bandwidth: float
    tokens_per_second: float
    share: float


@dataclass(frozen=True)
class SpeedReport:
    """Speed and memory of one model under one budget.

    Attributes:
        model: as the user named it.
        banner: precision, dtype and share of experts in memory, in words.
        prompt_tokens: length of each prompt.
        new_tokens: tokens decoded after it.
        text: ``"text"`` if prompts are text and continuations sampled, ``"random"`` if all token ids were
            drawn at random (models without a tokenizer).
        prefill: tokens/s of reading the prompt.
        decode: tokens/s of the continuation.
        first_token_seconds: from the prompt to the first token.
        memory: the budget in bytes, or None.
        peak_resident_bytes: largest resident memory of the process in its life (VmHWM).
        hit_rate: share of experts that an event found in each tier while decoding; None before any event.
        miss_bytes_per_token: read from disk per decoded token.
        bound: what bandwidth allows.
        kind: always ``"measured"``.
    """

    model: str
    banner: str
    prompt_tokens: int
    new_tokens: int
    text: str
    prefill: Spread
    decode: Spread
    first_token_seconds: Spread
    memory: int | None
    peak_resident_bytes: int | None
    hit_rate: dict[str, float | None]
    miss_bytes_per_token: float
    bound: Bound
    kind: str = "measured"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
