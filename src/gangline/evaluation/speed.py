"""``bench``: how fast a model runs under its budget, and how much of what bandwidth allows that is.

Batch 1. Every repetition has a fresh prompt. A model with a tokenizer reads text and samples from its own
probabilities (greedy text soon repeats itself, and with it the routing); one without, such as a random-weight
checkpoint, is fed random token ids.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from gangline.core.errors import UsageError
from gangline.core.sizes import parse_size
from gangline.evaluation.bound import bandwidths, decode_bound
from gangline.evaluation.generation import fixed_length
from gangline.evaluation.plain import find_checkpoint, load_tokenizer, place
from gangline.evaluation.prompts import prompt_ids
from gangline.evaluation.speed_report import SpeedReport, Spread

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
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    repetitions: int = 5
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 2 or self.repetitions < 1 or self.warmup < 0:
            raise UsageError(
                f"cannot time {self.repetitions} runs of {self.prompt_tokens} + {self.new_tokens} tokens; "
                "give at least 1 run, 1 prompt token and 2 new tokens"
            )


@dataclass(frozen=True)
class _Sample:
    prefill_seconds: float
    decode_seconds: float
    hits: int
    misses: int
    bytes_read: int


class _Clock:
    """A streamer that notes when each token is out, and the counters at the first one (batch 1)."""

    def __init__(self, counters: Callable[[], Any]) -> None:
        self._counters = counters
        self.times: list[float] = []
        self.at_first: Any = None

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token."""
        if len(self.times) == 1:
            self.at_first = self._counters()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


class _RandomTokens(LogitsProcessor):
    """Makes the next token a random one, whatever the model says."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        token = int(torch.randint(0, self._vocabulary, (1,), generator=self._generator))
        forced[:, token] = 0.0
        return forced


def bench_model(
    model: str | Path,
    settings: SpeedSettings | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    memory: str | int | None = None,
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
        progress: called with the name of each step as it begins.
        loading: passed on to :func:`gangline.runtime.load.load_model` (``precision``, ``dtype``, ``threads``,
            ``io``, ``ctx_size``).

    Raises:
        GanglineError: the model cannot be loaded within the budget.
    """
    from gangline.runtime.load import load_model
    from gangline.runtime.runtime import peak_resident

    settings = settings or SpeedSettings()
    say = progress or logger.info
    tokenizer = load_tokenizer(find_checkpoint(model, revision))
    say("loading")
    ours: Any = load_model(place(model), revision=revision, memory=memory, **loading)
    try:
        runtime = ours.gangline
        say("bandwidth of disk and memory")
        before = bandwidths(runtime)
        runs = settings.warmup + settings.repetitions
        samples = []
        for run in range(runs):
            say(f"run {run + 1} of {runs}")
            samples.append(_one_run(ours, tokenizer, settings, settings.seed + run))
        peak = peak_resident()
        after = bandwidths(runtime)
        return _report(
            ours,
            settings,
            samples[settings.warmup :],
            (before, after),
            model=name or str(model),
            text="random" if tokenizer is None else "text",
            memory=parse_size(memory) if memory is not None else None,
            peak_resident_bytes=peak,
        )
    finally:
        ours.gangline.close()


def _report(
    ours: Any,
    settings: SpeedSettings,
    samples: list[_Sample],
    measurements: tuple[tuple[float, float], tuple[float, float]],
    **known: Any,
) -> SpeedReport:
    """Add up the samples; ``known`` are the fields of the report that need no adding up."""
    tokens = settings.new_tokens - 1
    decode = Spread.of([tokens / sample.decode_seconds for sample in samples])
    read = sum(item.bytes_read for item in samples) / (tokens * len(samples))
    return SpeedReport(
        banner=ours.gangline.banner(),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        prefill=Spread.of([settings.prompt_tokens / sample.prefill_seconds for sample in samples]),
        decode=decode,
        first_token_seconds=Spread.of([sample.prefill_seconds for sample in samples]),
        hit_rate=_hit_rates(sum(item.hits for item in samples), sum(item.misses for item in samples)),
        miss_bytes_per_token=read,
        bound=decode_bound(ours, read, decode.median, measurements),
        **known,
    )


def _hit_rates(hits: int, misses: int) -> dict[str, float | None]:
    """Return the share of experts found in each tier."""
    seen = hits + misses
    return {"host": hits / seen if seen else None, "disk": misses / seen if seen else None}


def _one_run(model: Any, tokenizer: Any | None, settings: SpeedSettings, seed: int) -> _Sample:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids_1P = prompt_ids(tokenizer, vocabulary, 1, settings.prompt_tokens, seed)
    clock = _Clock(model.gangline.stats)
    forced = LogitsProcessorList([] if tokenizer is not None else [_RandomTokens(vocabulary, seed)])
    torch.manual_seed(seed)
    with fixed_length(model, settings.new_tokens, sample=tokenizer is not None), torch.inference_mode():
        model.generate(
            ids_1P, attention_mask=torch.ones_like(ids_1P), streamer=clock, logits_processor=forced
        )
    end, first = model.gangline.stats(), clock.at_first
    return _Sample(
        prefill_seconds=clock.times[1] - clock.times[0],
        decode_seconds=clock.times[-1] - clock.times[1],
        hits=end.host_hits - first.host_hits,
        misses=end.host_misses - first.host_misses,
        bytes_read=end.bytes_read - first.bytes_read,
    )
