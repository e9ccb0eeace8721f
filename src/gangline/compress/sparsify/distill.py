"""Let a pruned model learn from the model before pruning, end to end, its zeros left where they are.

What learns: every weight that pruning has kept, and with it what is not pruned (attention, norms, shared
experts): it sees every token, where an expert sees few. Embeddings, output head and routers stay, so that
tokens go where they went. ``compress/distillation.py`` has the loss and the steps.

In memory: the teacher's experts as stored and its dense part; of the student for every weight that learns its
fp32 value, its gradient and the two moments of Adam, and its experts, zeros included, in the dtype of the
products.

Shapes: S texts, B texts of a batch, C tokens of a text.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gangline.checkpoint.source import ExpertSource
from gangline.compress.distillation import DistillConfig, Progress, Said, learn, say
from gangline.compress.sparsify.banks import StudentBank, TeacherBank
from gangline.compress.sparsify.expert import ExpertForm, PackedExpert, decode_expert
from gangline.compress.sparsify.halfway import Halfway, key_of
from gangline.kernels.cpu.features import features_from_system
from gangline.models import MoEBlock, MoEView, expert_math, install

# Relative to the root mean square of a matrix. All layers step the same way at once, so that the model moves
# by far more than each of them: at 0.0015 the demo model (30 layers) moves away from its teacher.
RATE = 0.0006
CLIP = 1.0  # the norm of all gradients of the demo model is 0.6 to 2
HIDDEN = 1.0
BATCH_TOKENS = 1024
MIN_STEPS = 32  # little text is learned from in smaller batches
KEEP_SECONDS = 600


@dataclass(frozen=True)
class DistillReport:
    """What learning did.

    Attributes:
        tokens: how many were learned from.
        losses: divergence from the teacher in nats a token: the mean of every tenth of the steps (of every
            step, if there are fewer than ten), on text that the student sees for the first time.
    """

    tokens: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Student:
    """A model that learns.

    Attributes:
        model: with its banks installed.
        banks: of all its MoE layers.
        dense: what else learns, by name.
    """

    model: Any
    banks: Sequence[StudentBank]
    dense: dict[str, nn.Parameter]

    def parameters(self) -> list[nn.Parameter]:
        """All that learns."""
        kept = [parameter for bank in self.banks for parameter in bank.parameters()]
        return [parameter for parameter in (*kept, *self.dense.values()) if parameter.numel()]


def make_teacher(model: nn.Module, view: MoEView, source: ExpertSource, dtype: torch.dtype) -> nn.Module:
    """Install the experts before pruning in a model loaded without them."""
    model.eval().requires_grad_(False)
    for block in view.blocks:
        teachers = [
            decode_expert(source.layouts[block.layer], raws, None)
            for _, raws in source.read_layer(block.layer)
        ]
        install(block, TeacherBank(_form(block, source), teachers, dtype))
    return model


def make_student(
    model: Any,
    view: MoEView,
    source: ExpertSource,
    students: Callable[[int], Sequence[PackedExpert]],
    dtype: torch.dtype,
    may_learn: Callable[[str, Sequence[int]], bool],
) -> Student:
    """Install the pruned experts in a model loaded without them.

    Args:
        model: the model.
        view: its MoE layers.
        source: where its experts came from.
        students: the pruned experts of a layer.
        dtype: that matrices are multiplied in.
        may_learn: tells of a parameter's name and shape whether the checkpoint can take other values for it.
    """
    model.eval().requires_grad_(False)
    fixed = _fixed(model, view)
    dense = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in fixed and may_learn(name, parameter.shape)
    }
    banks = []
    for block in view.blocks:
        bank = StudentBank(_form(block, source), students(block.layer), dtype)
        install(block, bank)
        banks.append(bank)
    for parameter in (*dense.values(), *(p for bank in banks for p in bank.parameters())):
        parameter.requires_grad_(True)
    return Student(model, banks, dense)


def _fixed(model: Any, view: MoEView) -> set[int]:
    """The parameters that stay: of embeddings, output head and routers, and the biases of experts."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    for block in view.blocks:
        modules += [block.experts, block.router]
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _form(block: MoEBlock, source: ExpertSource) -> ExpertForm:
    names = [spec.name for spec in source.layouts[block.layer].fields]
    return ExpertForm(names, expert_math(block))


def product_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it, else fp32."""
    features = features_from_system()
    fast = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def distill_student(
    teacher: nn.Module,
    student: Student,
    ids_SC: Tensor,
    tokens: int,
    *,
    text: float = 0.0,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, int, float], object] = lambda step, steps, loss: None,
    halfway: Halfway | None = None,
    key: str = "",
) -> DistillReport:
    """Train a student in place.

    Args:
        teacher: from :func:`make_teacher`.
        student: from :func:`make_student`.
        ids_SC: token ids of the text, pieces of equal length.
        tokens: how many to learn from; the text is repeated where it is shorter.
        text: share of the text's own next tokens in what is learned, the rest being the teacher's.
        dtype: what matrix products are computed in.
        on_step: called after each step with how many are done, how many there are, and the loss.
        halfway: where to note every ten minutes how far it is, and where to go on from.
        key: what the student was made from.
    """
    batches = list(_batches(ids_SC, tokens))
    warmup = max(1, len(batches) // 10)
    config = DistillConfig(len(batches), RATE, warmup, hidden=HIDDEN, text=text, clip=CLIP)
    key = key_of(key, ids_SC, tokens, config)
    parameters = student.parameters()
    kept_at = time.monotonic()

    def speak(ids_BC: Tensor, teaching: bool) -> Said:
        speaker = teacher if teaching else student.model
        return say(speaker, ids_BC, learning=not teaching, dtype=dtype, hidden=True)

    def after(now: Progress) -> None:
        nonlocal kept_at
        if halfway is not None and time.monotonic() - kept_at > KEEP_SECONDS:
            halfway.keep_learning(key, parameters, now)
            kept_at = time.monotonic()
        on_step(now.step, len(batches), now.losses[-1])

    begun = None if halfway is None else halfway.begun(key, parameters)
    losses = learn(parameters, speak, batches, config, after, begun)
    return DistillReport(sum(batch.numel() for batch in batches), _means(losses, 10))


def _batches(ids_SC: Tensor, tokens: int) -> Iterator[Tensor]:
    """Pieces in random order, some at a time, until there are so many tokens (one batch at least)."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, tokens // ids_SC.shape[1])
    rounds = -(-count // len(ids_SC))
    orders = [torch.randperm(len(ids_SC), generator=generator) for _ in range(rounds)]
    chosen = torch.cat(orders)[:count]
    batch_tokens = min(BATCH_TOKENS, tokens // MIN_STEPS)
    for part in chosen.split(max(1, batch_tokens // ids_SC.shape[1])):
        yield ids_SC[part]


def _means(values: Sequence[float], parts: int) -> tuple[float, ...]:
    parts = min(parts, len(values))
    edges = [len(values) * number // parts for number in range(parts + 1)]
    return tuple(sum(values[a:b]) / (b - a) for a, b in pairwise(edges))
