"""Train some parameters of a model so that it says what a teacher says.

The loss is the Kullback-Leibler divergence of next-token distributions, teacher first, as in knowledge
distillation (arXiv 1503.02531), if asked for mixed with the cross-entropy of the text; and if asked for the
distance of the hidden states after each layer, relative to their size, as in SquareHead (Sparse Fine-tuning
for Inference Acceleration of Large Language Models, arXiv 2310.06927). Ours differs from SquareHead in that
every token counts the same: there the few tokens whose hidden states are hundreds of times as large as the
others' would decide alone.

Shapes: B sequences, C tokens per sequence, T = B * C tokens, V vocabulary, D hidden, R rows at a time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 64
"""Tokens whose probabilities are computed at a time: few enough to stay in a processor's cache."""


@dataclass(frozen=True)
class DistillConfig:
    """Steps, and the step size relative to the typical size of each factor's entries.

    Attributes:
        steps: how many.
        rate: the largest step relative to the root mean square of a parameter.
        warmup: steps in which the rate rises to that.
        hidden: how much the hidden states count beside the divergence.
        text: share of the text's own next tokens in what is learned, the rest being the teacher's.
        clip: the largest norm of all gradients together; larger ones are scaled down to it. 0 for any.
    """

    steps: int = 200
    rate: float = 0.02
    warmup: int = 10
    hidden: float = 0.0
    text: float = 0.0
    clip: float = 0.0


@dataclass(frozen=True)
class Said:
    """What a model makes of a batch.

    Attributes:
        logits_TV: of the next token.
        hidden: after each layer ``[B, C, D]``; empty if it was not asked for.
    """

    logits_TV: Tensor
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Progress:
    """Where learning stands: what is needed to go on from there, beside the parameters.

    Attributes:
        step: how many steps are done.
        rates: the full step size of every parameter.
        moments: mean and mean square of every parameter's gradients, as Adam keeps them.
        losses: divergence in nats a token, of every step so far.
    """

    step: int
    rates: list[float]
    moments: list[tuple[Tensor, Tensor]]
    losses: list[float]


def say(model: Any, ids_BC: Tensor, *, learning: bool, dtype: torch.dtype, hidden: bool = False) -> Said:
    """What a model says of a batch; computed in ``dtype`` where that loses little."""
    with (
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        torch.set_grad_enabled(learning),
    ):
        out = model(ids_BC, use_cache=False, output_hidden_states=hidden)
    return Said(out.logits.flatten(0, 1), tuple(out.hidden_states[1:]) if hidden else ())


class _Divergence(torch.autograd.Function):
    """Some rows at a time, value and gradient at once: nothing of the size of the logits but the gradient."""

    @staticmethod
    def forward(ctx: Any, student_TV: Tensor, teacher_TV: Tensor, next_T: Tensor, text: float) -> Tensor:
        total = 0.0
        grad_TV = torch.empty_like(student_TV)
        parts = (tensor.split(_ROWS) for tensor in (student_TV, teacher_TV, grad_TV, next_T))
        for student_RV, teacher_RV, grad_RV, next_R in zip(*parts, strict=True):
            log_s_RV = student_RV.float().log_softmax(-1)
            log_t_RV = teacher_RV.float().log_softmax(-1)
            t_RV = log_t_RV.exp()
            total += float((t_RV * log_t_RV.sub_(log_s_RV)).sum())
            if text:
                share_R1 = (next_R >= 0).float()[:, None] * text
                t_RV.mul_(1 - share_R1).scatter_add_(1, next_R.clamp(min=0)[:, None], share_R1)
            grad_RV.copy_(log_s_RV.exp_().sub_(t_RV).div_(len(student_TV)))
        ctx.save_for_backward(grad_TV)
        return student_TV.new_tensor(total / len(student_TV), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_TV,) = ctx.saved_tensors
        return grad_TV * grads[0].to(grad_TV.dtype), None, None, None


def divergence(
    student_TV: Tensor, teacher_TV: Tensor, next_T: Tensor | None = None, text: float = 0.0
) -> Tensor:
    """Mean divergence in nats a token of the student's next-token distributions from the teacher's.

    Args:
        student_TV: logits that learn.
        teacher_TV: logits that do not.
        next_T: the token that the text goes on with, -1 where it ends.
        text: share of the text in the gradient: it is that of the cross-entropy with the teacher's
            distribution and the text's next token, mixed. The value does not depend on it.
    """
    if next_T is None:
        next_T = torch.full((len(student_TV),), -1)
    found: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_TV, teacher_TV, next_T, text
    )
    return found


def distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states relative to the teacher's square, mean of tokens and layers."""
    total = torch.zeros(())
    for s_BCD, t_BCD in zip(student, teacher, strict=True):
        t_BCD = t_BCD.float()
        square_BC = t_BCD.square().sum(dim=-1).clamp(min=1e-30)
        total = total + ((s_BCD.float() - t_BCD).square().sum(dim=-1) / square_BC).mean()
    return total / max(1, len(teacher))


def learn(
    parameters: Sequence[nn.Parameter],
    speak: Callable[[Tensor, bool], Said],
    batches: Iterable[Tensor],
    config: DistillConfig,
    on_step: Callable[[Progress], object] = lambda progress: None,
    begun: Progress | None = None,
) -> list[float]:
    """Train parameters in place with Adam, the rate warmed up and then lowered to 0 along a cosine.

    Args:
        parameters: what learns.
        speak: what is said of a batch; by the teacher if the second argument is true.
        batches: token ids ``[B, C]``; at most ``config.steps`` are used.
        config: how many steps, and how large.
        on_step: called after every step with where learning stands.
        begun: where to go on, the parameters being what they were there; None for the beginning.

    Returns:
        The divergence in nats a token at every step.
    """
    rates = begun.rates if begun else [config.rate * _size(parameter) for parameter in parameters]
    adam = torch.optim.Adam([{"params": [p]} for p in parameters], betas=(0.9, 0.98), fused=True)
    losses = list(begun.losses) if begun else []
    if begun is not None:
        for parameter, (mean, square) in zip(parameters, begun.moments, strict=True):
            step = torch.tensor(float(begun.step))
            adam.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    for step_number, ids_BC in enumerate(islice(batches, len(losses), config.steps), start=len(losses)):
        share = _share(step_number, config)
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * share
        losses.append(_step(adam, speak, ids_BC, config))
        states = [adam.state[parameter] for parameter in parameters]
        moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
        on_step(Progress(step_number + 1, rates, moments, losses))
    return losses


def _step(
    adam: torch.optim.Adam, speak: Callable[[Tensor, bool], Said], ids_BC: Tensor, config: DistillConfig
) -> float:
    teacher, student = speak(ids_BC, True), speak(ids_BC, False)
    next_BC = torch.nn.functional.pad(ids_BC[:, 1:], (0, 1), value=-1)
    found = divergence(student.logits_TV, teacher.logits_TV, next_BC.flatten(), config.text)
    loss = found
    if config.hidden:
        loss = found + config.hidden * distance(student.hidden, teacher.hidden)
    del teacher, student
    adam.zero_grad()
    loss.backward()
    for group in adam.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:  # an expert that no token was sent to: its momentum goes on
                parameter.grad = torch.zeros_like(parameter)
    if config.clip:
        learning = [parameter for group in adam.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(learning, config.clip)
    adam.step()
    return float(found.detach())


def _size(parameter: Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt())


def _share(step: int, config: DistillConfig) -> float:
    rising = min(1.0, (step + 1) / config.warmup)
    return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
