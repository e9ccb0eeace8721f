"""The comparison with the plain transformers model: run it, and judge how far it agrees."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gangline.checkpoint.locate import LocalCheckpoint
from gangline.evaluation.compare import TOLERANCE, first_offence, logit_tolerance
from gangline.evaluation.generation import Generation, generate_greedy
from gangline.evaluation.plain import load_plain, no_room_for_plain
from gangline.evaluation.routing import Flip, Routing, first_flip, record_routing
from gangline.runtime.opened import OpenedModel


@dataclass(frozen=True)
class RecordedRun:
    """What one model said to one batch of prompts, and which experts it chose on the way."""

    generation: Generation
    routing: Routing


@dataclass(frozen=True)
class Reference:
    """What the plain model said, by batch size.

    Attributes:
        name: what it was, or why it did not run.
        runs: empty if it did not run.
        tolerance: largest accepted difference of a logit; None if it did not run.
    """

    name: str
    runs: Mapping[int, RecordedRun]
    tolerance: float | None


OFF = Reference("not run: switched off", {}, None)


def recorded_runs(
    model: Any, layers: list[str], prompts: Mapping[int, Tensor], new_tokens: int, *, apart: bool = False
) -> dict[int, RecordedRun]:
    """Continue every batch of prompts; the routing of the experts modules ``layers`` goes on record.

    ``apart`` records it in a second run: a model that is listened to may compute in another way (our native
    decode steps aside for hooks), and what it says must be what it says to everybody.
    """
    runs = {}
    for batch, ids_BP in prompts.items():
        generation = generate_greedy(model, ids_BP, new_tokens) if apart else None
        with record_routing(model, layers, batch) as routing:
            heard = generate_greedy(model, ids_BP, new_tokens)
        runs[batch] = RecordedRun(generation or heard, routing)
    return runs


def run_reference(
    opened: OpenedModel,
    checkpoint: LocalCheckpoint,
    prompts: Mapping[int, Tensor],
    new_tokens: int,
    say: Callable[[str], None],
) -> Reference:
    """Run the plain transformers model on the same prompts, if it fits in memory."""
    missing = no_room_for_plain(opened.cls, opened.config, opened.dtype)
    if missing is not None:
        return Reference(f"not run: {missing}", {}, None)
    say("plain transformers model")
    model = load_plain(checkpoint, opened.cls, opened.config, opened.dtype)
    runs = recorded_runs(model, [block.name for block in opened.view.blocks], prompts, new_tokens)
    del model
    gc.collect()
    tolerance = max(logit_tolerance(run.generation, opened.dtype) for run in runs.values())
    dtype = str(opened.dtype).removeprefix("torch.")
    return Reference(f"{opened.cls.__name__} of transformers, {dtype}", runs, tolerance)


def judge(
    ours: Mapping[int, RecordedRun], reference: Reference, dtype: torch.dtype, prompt_tokens: int
) -> tuple[bool | None, tuple[Flip, ...]]:
    """Say whether the plain model agrees, and name the router ties without which it would not.

    In fp32 all tokens must be the same and all logits within the tolerance. In lower precision a row may
    leave the tolerance only after a router decided otherwise on inputs that agreed within the type's share.

    Returns:
        whether it agrees (None if it did not run), and the router ties that excuse a row.
    """
    if reference.tolerance is None:
        return None, ()
    flips = []
    for batch, run in ours.items():
        plain = reference.runs[batch]
        if dtype == torch.float32 and not torch.equal(run.generation.tokens_BN, plain.generation.tokens_BN):
            return False, ()
        for row in range(batch):
            offence = first_offence(run.generation, plain.generation, row, reference.tolerance)
            if offence is None:
                continue
            flip = first_flip(run.routing, plain.routing, row, TOLERANCE[dtype])
            late = flip is None or flip.position > prompt_tokens - 1 + offence
            if dtype == torch.float32 or flip is None or late or flip.input_difference > TOLERANCE[dtype]:
                return False, ()
            flips.append(flip)
    return True, tuple(flips)
