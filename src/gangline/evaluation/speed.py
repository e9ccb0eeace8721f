"""``bench``: how fast a model runs under its budget, and how much of what bandwidth allows that is.

Every repetition has fresh prompts. A model with a tokenizer reads text and samples from its own
probabilities (greedy text soon repeats itself, and with it the routing); one without, such as a random-weight
checkpoint, is fed random token ids.

Legend: B sequences, P prompt tokens, N new tokens.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.core.errors import UsageError
from gangline.core.sizes import parse_size
from gangline.evaluation.bound import Bandwidths, bandwidths, decode_bound
from gangline.evaluation.plain import find_checkpoint, load_tokenizer, place
from gangline.evaluation.prompts import prompt_ids
from gangline.evaluation.speed_report import SpeedReport, Spread
from gangline.evaluation.speed_run import Sample
from gangline.evaluation.speed_side import Facts, OurSide

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class SpeedSettings:
    """How long to measure.

    Attributes:
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens decoded after it, at least 2.
        repetitions: timed runs.
        warmup: runs before them that are not counted.
        seed: of prompts and sampling.
        batch: sequences at once.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    repetitions: int = 5
    warmup: int = 1
    seed: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 2 or self.repetitions < 1 or self.warmup < 0:
            raise UsageError(
                f"cannot time {self.repetitions} runs of {self.prompt_tokens} + {self.new_tokens} tokens; "
                "give at least 1 run, 1 prompt token and 2 new tokens"
            )
        if self.batch < 1:
            raise UsageError(f"a batch of {self.batch} sequences decodes nothing; give 1 or more")

    @property
    def context(self) -> int:
        """Tokens over all sequences."""
        return self.batch * (self.prompt_tokens + self.new_tokens)

    @property
    def steps(self) -> int:
        """Decoding steps of a run: the first new token comes from the prompt."""
        return self.new_tokens - 1

    def decode_rate(self, sample: Sample) -> float:
        """Decoded tokens/s over all sequences."""
        return self.batch * self.steps / sample.decode_seconds

    def prefill_rate(self, sample: Sample) -> float:
        """Prompt tokens/s over all sequences."""
        return self.batch * self.prompt_tokens / sample.prefill_seconds


@dataclass(frozen=True)
class Routing:
    """Something to do to a loaded model while it is timed, such as replaying a routing trace.

    Attributes:
        note: what it is, for the report.
        around: entered with the model before the first run, left after the last.
    """

    note: str
    around: Callable[[Any], AbstractContextManager[Any]]


OWN_ROUTING = Routing("own", lambda model: nullcontext())


def bench_model(
    model: str | Path,
    settings: SpeedSettings | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    memory: str | int | None = None,
    routing: Routing = OWN_ROUTING,
    progress: Progress | None = None,
    **loading: Any,
) -> SpeedReport:
    """Load a model within ``memory`` and time it.

    Args:
        model: as for :func:`gangline.load`.
        settings: how long to measure.
        name: what the report calls the model.
        revision: branch, tag or commit on the Hub.
        memory: budget of this process, as for :func:`gangline.load`.
        routing: what to do to the model meanwhile.
        progress: called with the name of each step as it begins.
        loading: passed on to :func:`gangline.runtime.load.load_model` (``precision``, ``dtype``, ``threads``,
            ``io``, ``ctx_size``).

    Raises:
        GanglineError: the model cannot be loaded within the budget.
    """
    settings = settings or SpeedSettings()
    say = progress or logger.info
    tokenizer = load_tokenizer(find_checkpoint(model, revision))
    say("loading")
    options = with_context(loading, settings) | {"revision": revision, "memory": memory}
    ours = OurSide(place(model), batch=settings.batch, **options)
    try:
        with routing.around(ours.model):
            samples, measured = _timed_runs(ours, tokenizer, settings, say)
        return make_report(
            ours.facts(),
            settings,
            samples,
            list(pairwise(measured)),
            model=name or str(model),
            text="random" if tokenizer is None else "text",
            routing=routing.note,
            memory=parse_size(memory) if memory is not None else None,
        )
    finally:
        ours.close()


def with_context(loading: dict[str, Any], settings: SpeedSettings) -> dict[str, Any]:
    """Return the loading options with room for a whole batch, where the user left that open."""
    if settings.batch == 1 or loading.get("ctx_size") is not None:
        return loading
    return loading | {"ctx_size": settings.context}


def _timed_runs(
    ours: OurSide, tokenizer: Any | None, settings: SpeedSettings, say: Progress
) -> tuple[list[Sample], list[Bandwidths]]:
    """Return the timed runs, and the bandwidths before each and after the last."""
    facts = ours.facts()
    samples, measured = [], []
    runs = settings.warmup + settings.repetitions
    for run in range(runs):
        if run >= settings.warmup:
            measured.append(bandwidths(facts.weights, facts.threads, disk=run == settings.warmup))
        say(f"run {run + 1} of {runs}")
        seed = settings.seed + run
        ids_BP, following_BN = draw_tokens(tokenizer, facts.vocabulary, settings, seed)
        torch.manual_seed(seed)
        # Text is continued by the model itself.
        following = following_BN if tokenizer is None else None
        sample = ours.run(ids_BP, settings.new_tokens, following)
        if run >= settings.warmup:
            samples.append(sample)
    measured.append(bandwidths(facts.weights, facts.threads, disk=True))
    return samples, measured


def draw_tokens(
    tokenizer: Any | None, vocabulary: int, settings: SpeedSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Return prompts ``[B, P]`` and the tokens ``[B, N]`` that follow in the text, or random ones of both."""
    length = settings.prompt_tokens + settings.new_tokens
    ids_BL = prompt_ids(tokenizer, vocabulary, settings.batch, length, seed)
    return ids_BL[:, : settings.prompt_tokens], ids_BL[:, settings.prompt_tokens :]


def make_report(
    facts: Facts,
    settings: SpeedSettings,
    samples: Sequence[Sample],
    beside: Sequence[tuple[Bandwidths, Bandwidths]],
    **known: Any,
) -> SpeedReport:
    """Add up the samples.

    Args:
        facts: of our side, after the runs.
        settings: how it was measured.
        samples: the timed runs.
        beside: bandwidths right before and right after each run.
        known: the fields of the report that need no adding up.
    """
    hits, misses = sum(item.hits for item in samples), sum(item.misses for item in samples)
    seen = hits + misses
    tokens = settings.batch * settings.steps * len(samples)
    return SpeedReport(
        banner=facts.banner,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        batch=settings.batch,
        prefill=Spread.of([settings.prefill_rate(sample) for sample in samples]),
        decode=Spread.of([settings.decode_rate(sample) for sample in samples]),
        first_token_seconds=Spread.of([sample.prefill_seconds for sample in samples]),
        peak_resident_bytes=facts.peak_resident_bytes,
        hit_rate={"host": hits / seen if seen else None, "disk": misses / seen if seen else None},
        miss_bytes_per_token=sum(item.bytes_read for item in samples) / tokens,
        bound=decode_bound(facts.weights, samples, settings.steps, settings.batch, beside),
        **known,
    )
