"""``check``: does the answer depend on where the experts lie? Compared bit by bit, and with the plain model.

Two levels. Against our own run with every expert in memory (or as many as there is room for), tokens and
logits must agree in every bit, whatever the budget, the batch and the order in which the cache evicts.
Against the plain transformers model, greedy tokens must be the same in fp32; in lower precision logits must
agree within a stated tolerance, and a token may differ only where the reference itself was within that
tolerance of a tie (each such place is named).
"""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gangline.core.errors import UsageError
from gangline.evaluation.check_report import Case, CheckReport
from gangline.evaluation.compare import agreement, bit_equal
from gangline.evaluation.generation import Generation, generate_greedy
from gangline.evaluation.plain import find_checkpoint, load_tokenizer, place
from gangline.evaluation.prompts import prompt_ids
from gangline.evaluation.reference import OFF, judge, recorded_runs, run_reference
from gangline.runtime.opened import OpenedModel, codec_of, open_model
from gangline.runtime.options import LoadOptions, plan_request
from gangline.runtime.planner import make_plan

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
            With ``mode="mixed"`` budgets may differ as well: the report then says by how much.

    Raises:
        GanglineError: the model cannot be loaded.
    """
    settings = settings or CheckSettings()
    say = progress or logger.info
    precision = str(loading.get("precision", "stored"))
    checkpoint = find_checkpoint(model, revision)
    opened = open_model(checkpoint, loading.get("dtype"))
    loading = {"revision": revision, "name": str(model), **loading}
    most = _baseline_slots(opened, loading)
    layers = [block.name for block in opened.view.blocks]
    loading["model"] = place(model)
    total = opened.view.geometry.total_experts
    baseline = "all experts in memory"
    if most is not None:
        baseline = f"{most} of {total} experts in memory, the most that this machine has room for"
    say(baseline)
    exact = loading | ({"policy": "default", "mode": "hint"} if loading.get("mode") == "mixed" else {})
    with _loaded(**exact, expert_slots=_EVERY if most is None else most) as ours:
        prompts = _prompts(ours, load_tokenizer(checkpoint), settings)
        resident = recorded_runs(ours, layers, prompts, settings.new_tokens, apart=True)
        budgets = _budgets(settings.shares, ours.gangline, most)
    reference = (
        run_reference(opened, checkpoint, prompts, settings.new_tokens, say) if settings.reference else OFF
    )
    cases, changed = [], None
    for name, slots, cache_seed in _runs(budgets, settings.cache_seeds):
        cache = "default" if cache_seed is None else f"random {cache_seed}"
        say(f"{name}: {slots} experts in memory, cache {cache}")
        with _loaded(**loading, expert_slots=slots, cache_seed=cache_seed) as ours:
            changed = ours.gangline.stats().approximate or changed
            for batch, ids_BP in prompts.items():
                before = ours.gangline.stats().host_misses
                found = generate_greedy(ours, ids_BP, settings.new_tokens)
                misses = ours.gangline.stats().host_misses - before
                plain = reference.runs[batch].generation if reference.runs else None
                pair = (resident[batch].generation, plain)
                cases.append(_case((name, slots, cache, batch, misses), found, *pair))
    agrees, flips = judge(resident, reference, opened.dtype, settings.prompt_tokens)
    return CheckReport(
        model=str(model),
        dtype=str(opened.dtype).removeprefix("torch."),
        precision=precision,
        baseline=baseline,
        reference=reference.name,
        tolerance=reference.tolerance,
        reference_passed=agrees if precision == "stored" else None,
        flips=flips,
        cases=tuple(cases),
        approximate=changed,
    )


def _baseline_slots(opened: OpenedModel, loading: dict[str, Any]) -> int | None:
    """Return the expert slots of the run that all others are compared with, None for every expert."""
    options = LoadOptions(**loading)
    request = plan_request(options, opened.config, model=opened.name)
    plan = make_plan(request, opened.footprint(codec_of(options.precision)))
    return None if plan.everything_resident else plan.experts_resident


def _prompts(model: Any, tokenizer: Any | None, settings: CheckSettings) -> dict[int, Tensor]:
    vocabulary = model.get_input_embeddings().num_embeddings
    return {
        batch: prompt_ids(tokenizer, vocabulary, batch, settings.prompt_tokens, settings.seed)
        for batch in settings.batch_sizes
    }


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


def _budgets(shares: tuple[float, ...], runtime: Any, most: int | None) -> list[tuple[str, int]]:
    """Return name and expert slots of each budget, largest first, the smallest possible last.

    Shares of more than ``most`` slots are left out: there is no room for them.
    """
    total, smallest = runtime.geometry.total_experts, runtime.smallest_slots
    named = {f"{100 * share:g} %": max(smallest, math.ceil(share * total)) for share in shares}
    named = {name: slots for name, slots in named.items() if most is None or slots <= most}
    return [*sorted(named.items(), key=lambda item: -item[1]), ("smallest", smallest)]


def _runs(
    budgets: list[tuple[str, int]], cache_seeds: tuple[int | None, ...]
) -> Iterator[tuple[str, int, int | None]]:
    """Yield (budget, slots, cache seed); where nothing can be evicted one order is enough."""
    for name, slots in budgets:
        for cache_seed in cache_seeds[:1] if name == "100 %" else cache_seeds:
            yield name, slots, cache_seed


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
        same_tokens=float((found.tokens_BN == resident.tokens_BN).float().mean()),
    )
