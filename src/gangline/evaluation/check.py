"""``check``: does the answer depend on where the experts lie? Compared bit by bit, and with the plain model.

Two levels. Against our own run with every expert in memory, tokens and logits must agree in every bit,
whatever the budget, the batch and the order in which the cache evicts. Against the plain transformers
model, greedy tokens must be the same in fp32; in lower precision logits must agree within a stated
tolerance, and a token may differ only where the reference itself was within that tolerance of a tie
(each such place is named).
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.checkpoint.locate import LocalCheckpoint
from gangline.core.errors import UsageError
from gangline.evaluation.check_report import Case, CheckReport
from gangline.evaluation.compare import agreement, bit_equal, logit_tolerance, only_near_ties
from gangline.evaluation.generation import Generation, generate_greedy
from gangline.evaluation.plain import find_checkpoint, load_plain, load_tokenizer, no_room_for_plain, place
from gangline.evaluation.prompts import prompt_ids

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
_EVERY = 2**31  # more slots than any model has experts


@dataclass(frozen=True)
class CheckSettings:
    """What to compare.

    Attributes:
        shares: budgets, as shares of all experts that fit in memory; the smallest possible is always added.
        batch_sizes: sequences per run.
        cache_seeds: cache orders: None is the default cache, a number evicts at random with that seed.
        prompt_tokens: length of each prompt.
        new_tokens: length of its continuation.
        seed: of the prompts.
        reference: compare with the plain transformers model, where it fits in memory.
    """

    shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    batch_sizes: tuple[int, ...] = (1, 3)
    cache_seeds: tuple[int | None, ...] = (None, 1)
    prompt_tokens: int = 24
    new_tokens: int = 16
    seed: int = 0
    reference: bool = True

    def __post_init__(self) -> None:
        if any(not 0 < share <= 1 for share in self.shares):
            raise UsageError(f"budgets {self.shares} must be shares above 0 and at most 1, for example 0.5")
        if min((*self.batch_sizes, self.prompt_tokens, self.new_tokens)) < 1:
            raise UsageError("batch sizes, prompt tokens and new tokens must be above zero")


@dataclass(frozen=True)
class _Reference:
    """What the plain model said, by batch size; empty with the reason where it did not run."""

    name: str
    runs: Mapping[int, Generation]
    tolerance: float | None


def check_model(
    model: str | Path,
    settings: CheckSettings | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **loading: Any,
) -> CheckReport:
    """Compare runs of one model that must not differ.

    Args:
        model: as for :func:`gangline.load`.
        settings: what to compare.
        revision: branch, tag or commit on the Hub.
        progress: called with the name of each step as it begins.
        loading: passed on to :func:`gangline.runtime.load.load_model` (``precision``, ``dtype``, ``threads``,
            ``io``). With an approximate precision the plain model is compared too but cannot fail the check.

    Raises:
        GanglineError: the model cannot be loaded, or not with all experts in memory.
    """
    settings = settings or CheckSettings()
    say = progress or logger.info
    checkpoint = find_checkpoint(model, revision)
    tokenizer = load_tokenizer(checkpoint)
    loading = {"model": place(model), "revision": revision, **loading}
    say("all experts in memory")
    with _loaded(**loading, expert_slots=_EVERY) as ours:
        vocabulary = ours.get_input_embeddings().num_embeddings
        prompts = {
            batch: prompt_ids(tokenizer, vocabulary, batch, settings.prompt_tokens, settings.seed)
            for batch in settings.batch_sizes
        }
        resident = _generations(ours, prompts, settings.new_tokens)
        kind, config, dtype = type(ours), ours.config, ours.dtype
        budgets = _budgets(settings.shares, ours.gangline)
    reference = _reference(checkpoint, (kind, config, dtype), prompts, settings, say)
    cases = []
    for name, slots, cache_seed in _runs(budgets, settings.cache_seeds):
        cache = "default" if cache_seed is None else f"random {cache_seed}"
        say(f"{name}: {slots} experts in memory, cache {cache}")
        with _loaded(**loading, expert_slots=slots, cache_seed=cache_seed) as ours:
            for batch, ids_BP in prompts.items():
                before = ours.gangline.stats().host_misses
                found = generate_greedy(ours, ids_BP, settings.new_tokens)
                misses = ours.gangline.stats().host_misses - before
                pair = (resident[batch], reference.runs.get(batch))
                cases.append(_case((name, slots, cache, batch, misses), found, *pair))
    precision = str(loading.get("precision", "stored"))
    return CheckReport(
        model=str(model),
        dtype=str(dtype).removeprefix("torch."),
        precision=precision,
        reference=reference.name,
        tolerance=reference.tolerance,
        reference_passed=_reference_passed(reference, cases, dtype) if precision == "stored" else None,
        cases=tuple(cases),
    )


@contextmanager
def _loaded(**loading: Any) -> Iterator[Any]:
    """Our model for the time of one run; its experts are freed afterwards."""
    from gangline.runtime.load import load_model

    model: Any = load_model(**loading)
    try:
        yield model
    finally:
        model.gangline.close()
        del model
        gc.collect()


def _budgets(shares: tuple[float, ...], runtime: Any) -> list[tuple[str, int]]:
    """Return name and expert slots of each budget, largest first, the smallest possible last."""
    total, smallest = runtime.geometry.total_experts, runtime.smallest_slots
    named = {f"{100 * share:g} %": max(smallest, math.ceil(share * total)) for share in shares}
    return [*sorted(named.items(), key=lambda item: -item[1]), ("smallest", smallest)]


def _runs(
    budgets: list[tuple[str, int]], cache_seeds: tuple[int | None, ...]
) -> Iterator[tuple[str, int, int | None]]:
    """Yield (budget, slots, cache seed); where nothing can be evicted one order is enough."""
    for name, slots in budgets:
        for cache_seed in cache_seeds[:1] if name == "100 %" else cache_seeds:
            yield name, slots, cache_seed


def _generations(model: Any, prompts: Mapping[int, Tensor], new_tokens: int) -> dict[int, Generation]:
    return {batch: generate_greedy(model, ids_BP, new_tokens) for batch, ids_BP in prompts.items()}


def _reference(
    checkpoint: LocalCheckpoint,
    identity: tuple[Any, Any, torch.dtype],
    prompts: Mapping[int, Tensor],
    settings: CheckSettings,
    say: Progress,
) -> _Reference:
    kind, config, dtype = identity
    if not settings.reference:
        return _Reference("not run: switched off", {}, None)
    missing = no_room_for_plain(kind, config, dtype)
    if missing is not None:
        return _Reference(f"not run: {missing}", {}, None)
    say("plain transformers model")
    model = load_plain(checkpoint, kind, config, dtype)
    runs = _generations(model, prompts, settings.new_tokens)
    del model
    gc.collect()
    tolerance = max(logit_tolerance(run, dtype) for run in runs.values())
    name = f"{kind.__name__} of transformers, {str(dtype).removeprefix('torch.')}"
    return _Reference(name, runs, tolerance)


def _case(
    what: tuple[str, int, str, int, int], found: Generation, resident: Generation, plain: Generation | None
) -> Case:
    name, slots, cache, batch, misses = what
    identical = bit_equal(found, resident)
    to_plain = agreement(found, plain) if plain is not None else None
    return Case(
        budget=name,
        expert_slots=slots,
        cache=cache,
        batch=batch,
        identical=identical,
        max_abs_logit_diff=0.0 if identical else agreement(found, resident).max_abs_logit_diff,
        reference_tokens_equal=to_plain.tokens_equal if to_plain else None,
        reference_max_abs_logit_diff=to_plain.max_abs_logit_diff if to_plain else None,
        divergences=to_plain.divergences if to_plain else (),
        misses=misses,
    )


def _reference_passed(reference: _Reference, cases: list[Case], dtype: torch.dtype) -> bool | None:
    """Whether the plain model agrees: equal tokens in fp32, near-ties and the tolerance below."""
    if reference.tolerance is None:
        return None
    close = all((case.reference_max_abs_logit_diff or 0.0) <= reference.tolerance for case in cases)
    if dtype == torch.float32:
        return close and all(case.reference_tokens_equal for case in cases)
    return close and all(only_near_ties(case.divergences, reference.tolerance) for case in cases)
