"""One timed run of a transformers model, ours or plain: read prompts, decode.

Legend: B sequences, P prompt tokens, N new tokens, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from gangline.evaluation.generation import fixed_length


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        prefill_seconds: from the prompts to the first tokens.
        decode_seconds: from the first tokens to the last.
        hits: experts that an event found in memory while decoding; 0 where nobody counts.
        misses: the others.
        bytes_read: expert bytes from disk while decoding.
        stall_seconds: of the decoding time, what was spent waiting for them.
        compute_seconds: of it, what computing leased experts took.
    """

    prefill_seconds: float
    decode_seconds: float
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0
    compute_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def timed_generation(model: Any, ids_BP: Tensor, new_tokens: int, following_BN: Tensor | None) -> Sample:
    """Continue every row by ``new_tokens`` tokens through ``generate()`` and time it.

    Args:
        model: a transformers model; the counters of ``model.gangline`` are read if it has one.
        ids_BP: prompts.
        new_tokens: N, at least 2.
        following_BN: the tokens that follow, whatever the model says; None samples from its probabilities.
    """
    runtime = getattr(model, "gangline", None)
    clock = _Clock(runtime.stats if runtime is not None else lambda: None)
    forced = LogitsProcessorList([] if following_BN is None else [ForcedTokens(following_BN)])
    with fixed_length(model, new_tokens, sample=following_BN is None), torch.inference_mode():
        model.generate(
            ids_BP, attention_mask=torch.ones_like(ids_BP), streamer=clock, logits_processor=forced
        )
    prefill, decode = clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]
    if runtime is None:
        return Sample(prefill, decode)
    first, end = clock.at_first, runtime.stats()
    return Sample(
        prefill,
        decode,
        hits=end.host_hits - first.host_hits,
        misses=end.host_misses - first.host_misses,
        bytes_read=end.bytes_read - first.bytes_read,
        stall_seconds=end.stall_seconds - first.stall_seconds,
        compute_seconds=end.compute_seconds - first.compute_seconds,
    )


class ForcedTokens(LogitsProcessor):
    """Makes given tokens follow, whatever the model says."""

    def __init__(self, following_BN: Tensor) -> None:
        self._tokens = following_BN.T.tolist()
        self._step = 0
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores of which only the next token's is finite."""
        size = scores.shape[1]
        if self._scores is None:  # a part of it has its only finite number wherever that is wanted
            self._scores = torch.full((2 * size,), -torch.inf)
            self._scores[size] = 0.0
        rows = [self._scores[size - token : 2 * size - token] for token in self._tokens[self._step]]
        self._step += 1
        return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


class _Clock:
    """A streamer that notes when each token is out, and the counters at the first one."""

    def __init__(self, counters: Callable[[], Any]) -> None:
        self._counters = counters
        self.times: list[float] = []
        self.at_first: Any = None

    def put(self, value: Tensor) -> None:
        """Called with the prompts, then with the tokens of each step."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.at_first = self._counters()

    def end(self) -> None:
        """Called after the last token."""
