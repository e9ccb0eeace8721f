"""What a user may say about loading a model; planning, loading and attaching share it."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig

from gangline.core.errors import UsageError
from gangline.core.sizes import parse_size
from gangline.models import is_chunk_safe
from gangline.runtime.files import IOMode
from gangline.runtime.footprint import text_config
from gangline.runtime.head_start import HeadStart
from gangline.runtime.planner import DEFAULT_CONTEXT, PREFILL_ROWS, PlanRequest
from gangline.runtime.policy_choice import PredictionMode


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of :func:`gangline.load`, :func:`gangline.plan` and :func:`gangline.attach`.

    Attributes:
        memory: peak resident memory of this process (``"6GiB"``); None takes what the machine has free.
        precision: ``stored`` (exact), or ``int8``, ``int4``, ``int4g32z`` ...: round the weights to that.
        ctx_size: tokens over all sequences for which keys and values are reserved.
        batch_tokens: rows of one forward pass; ``generate`` feeds a prompt in chunks of this many tokens.
        dtype: number format of the dense weights and of the computation; None keeps the checkpoint's.
        threads: threads that compute; None leaves torch's setting.
        io: how expert files are read: ``direct`` (past the page cache), ``cached``, or ``auto``.
        revision: branch, tag or commit on the Hub.
        expert_slots: this many slots instead of what the budget allows (for tests of exactness).
        cache_seed: evict at random under this seed instead of by the policy (for the same).
        policy: a composition by name, or a ``.yaml`` file with one; None takes what ``gangline tune`` found
            for this model, memory and machine, else ``default``.
        predictor: what the policy learned: a file of ``gangline predict train``, or a trace.
        mode: ``hint``: routers decide what is computed, the predictor only what is read ahead. ``execute``:
            SiDA's own mode, its predictor decides and routers are skipped (approximate; policy ``sida``).
            ``mixed``: HOBBIT's, experts that are not in memory may be computed in a second, lower precision
            or left out (approximate; policy ``hobbit``, or a file with a precision).
        native_only: only the next token's logits will be asked of the model, and whatever else is to be in
            this process (a tokenizer) is there: where the native core computes that, what the planner has
            reserved for torch becomes slots, and a call that torch must compute is refused.
        progress: show bars; None shows them on a terminal.
        device: where experts are computed: ``cpu``, or ``cuda`` (``cuda:1``) for sparse experts that all fit
            there; None takes a GPU only where its times were measured.
        name: what messages and reports call the model; None is what ``model`` says.
        meanwhile: called once while the model is loaded: at a time when experts may be on their way.
        head_start: experts that may be on their way before (:mod:`gangline.runtime.head_start`).
    """

    memory: str | int | None = None
    precision: str = "stored"
    ctx_size: int | None = None
    batch_tokens: int | None = None
    dtype: torch.dtype | None = None
    threads: int | None = None
    io: IOMode = "auto"
    revision: str | None = None
    expert_slots: int | None = None
    cache_seed: int | None = None
    policy: str | None = None
    predictor: str | None = None
    mode: PredictionMode = "hint"
    native_only: bool = False
    progress: bool | None = None
    device: str | None = None
    name: str | None = None
    meanwhile: Callable[[], object] | None = None
    head_start: HeadStart | None = None


def plan_request(
    options: LoadOptions, config: PreTrainedConfig, *, model: str, context: int | None = None, held: int = 0
) -> PlanRequest:
    """Return what is asked of the planner, with what the user left open filled in.

    Args:
        options: what the user said.
        config: the model's configuration.
        model: what messages call the model.
        context: tokens if the user gave no ``ctx_size``; None takes the model's own limit, at most 4096.
        held: bytes of this process that the plan counts elsewhere (dense weights that are loaded already).

    Raises:
        UsageError: a size cannot be read, or chunks of a prompt are asked for where they change the answer.
    """
    context = options.ctx_size or context or _usual_context(config)
    slots = 0 if options.head_start is None else options.head_start.taken_bytes
    return PlanRequest(
        model=model,
        budget=None if options.memory is None else parse_size(options.memory),
        precision=options.precision,
        context=context,
        rows=_prefill_rows(config, context, options.batch_tokens),
        process=max(0, int(psutil.Process().memory_info().rss) - held - slots),
        available=int((psutil.virtual_memory().available + slots) * 0.9),
        expert_slots=options.expert_slots,
    )


def _usual_context(config: PreTrainedConfig) -> int:
    longest = int(getattr(text_config(config), "max_position_embeddings", 0) or 0)
    return min(longest, DEFAULT_CONTEXT) if longest else DEFAULT_CONTEXT


def _prefill_rows(config: PreTrainedConfig, context: int, batch_tokens: int | None) -> int:
    """Return how many tokens of a prompt are computed at once.

    Raises:
        UsageError: chunks are asked for of a family that transformers does not compute right in chunks.
    """
    if is_chunk_safe(config):
        return min(batch_tokens or PREFILL_ROWS, context)
    if batch_tokens is not None and batch_tokens < context:
        raise UsageError(
            f"transformers does not compute {config.model_type} right in chunks of a prompt; "
            f"leave batch_tokens out, or set ctx_size to at most {batch_tokens}"
        )
    return context
