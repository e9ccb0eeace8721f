"""Train some parameters of a model so that it says what a teacher says.

The loss is the Kullback-Leibler divergence of next-token distributions, teacher first, as in knowledge
distillation (arXiv 1503.02531).

Shapes: B sequences, C tokens per sequence, T = B * C tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DistillConfig:
    """Steps, and the step size relative to the typical size of each factor's entries."""

    steps: int = 200
    rate: float = 0.02
    warmup: int = 10


def log_probabilities(model: Any, ids_BC: Tensor, *, learning: bool, dtype: torch.dtype) -> Tensor:
    """Log-probabilities ``[T, V]`` of the next token, fp32; computed in ``dtype`` where that loses little."""
    with (
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        torch.set_grad_enabled(learning),
    ):
        logits_BCV: Tensor = model(ids_BC, use_cache=False).logits
    return logits_BCV.flatten(0, 1).float().log_softmax(-1)


def learn(
    parameters: Sequence[nn.Parameter],
    speak: Callable[[Tensor, bool], Tensor],
    batches: Iterable[Tensor],
    config: DistillConfig,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> None:
    """Train parameters in place with Adam, the rate warmed up and then lowered to 0 along a cosine.

    Args:
        parameters: what learns.
        speak: log-probabilities ``[T, V]`` of a batch; of the teacher if its second argument is true.
        batches: token ids ``[B, C]``; at most ``config.steps`` are used.
        config: how many steps, and how large.
        on_step: called with the step and its loss in nats per token.
    """
    sizes = [float(parameter.detach().square().mean().sqrt()) for parameter in parameters]
    adam = torch.optim.Adam(
        [{"params": [p], "lr": config.rate * size} for p, size in zip(parameters, sizes, strict=True)],
        betas=(0.9, 0.98),
    )

    def share(step: int) -> float:
        rising = min(1.0, (step + 1) / config.warmup)
        return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, share)
    for step, ids_BC in zip(range(config.steps), batches, strict=False):
        teacher_TV = speak(ids_BC, True)
        student_TV = speak(ids_BC, False)
        loss = nn.functional.kl_div(student_TV, teacher_TV, log_target=True, reduction="batchmean")
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        on_step(step, float(loss.detach()))
