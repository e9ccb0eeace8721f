"""Let pruned experts learn from the experts before pruning, end to end, their zeros left where they are.

Teacher and student are one model: the dense part, which neither changes nor is stored twice, computes with
the experts before pruning or with the pruned ones. What learns is the weights that pruning has kept, all of
them; ``compress/distillation.py`` has the loss and the steps.

In memory: all experts as stored, and for every weight that is kept its fp32 value, its gradient and the two
moments of Adam; beside them, while a batch is computed, the student's experts in fp32.

Shapes: S texts, B texts of a batch, C tokens of a text, T tokens, K experts of a token, D hidden, O and I
outputs and inputs of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gangline.checkpoint.source import ExpertSource
from gangline.compress.distillation import DistillConfig, learn, log_probabilities
from gangline.compress.sparsify.expert import ExpertForm, PackedExpert, decode_expert
from gangline.compress.sparsify.walk import Routing
from gangline.kernels.cpu.features import features_from_system
from gangline.models import MoEBlock, expert_math, install

RATE = 0.003
BATCH_TOKENS = 2048


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


class KeptWeights(nn.Module):
    """A matrix of which only what pruning has kept is stored and learns."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.mask_OI = weight_OI != 0
        self.values = nn.Parameter(weight_OI[self.mask_OI])

    def forward(self) -> Tensor:
        """The matrix ``(out, in)`` in fp32."""
        empty_OI = torch.zeros(self.mask_OI.shape)
        return empty_OI.masked_scatter(self.mask_OI, self.values)


class TwoBanks(nn.Module):
    """The experts of a layer, before pruning (teacher) and pruned (student); installed in the layer."""

    def __init__(
        self, form: ExpertForm, teachers: Sequence[Sequence[Tensor]], students: Sequence[PackedExpert]
    ) -> None:
        super().__init__()
        self.teacher = False
        self._form, self._teachers = form, teachers
        self.students = nn.ModuleList(
            nn.ModuleList(KeptWeights(weight) for weight in student.weights()) for student in students
        )

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the chosen experts put out, weighted and summed."""
        routing = Routing(x_TD, ids_TK, weights_TK)
        out_TD = torch.zeros(x_TD.shape)
        for expert in ids_TK.unique().tolist():
            if expert < len(self._teachers):  # a higher number marks an empty slot
                self._form.add_output(out_TD, routing, self._weights(expert, x_TD.dtype), expert)
        return out_TD.to(x_TD.dtype)

    def _weights(self, expert: int, dtype: torch.dtype) -> list[Tensor]:
        if self.teacher:
            return [weight.to(dtype) for weight in self._teachers[expert]]
        matrices = self.students[expert]
        assert isinstance(matrices, nn.ModuleList)
        return [matrix().to(dtype) for matrix in matrices]

    def learned(self) -> Iterator[list[Tensor]]:
        """The student's matrices, expert by expert."""
        for matrices in self.students:
            assert isinstance(matrices, nn.ModuleList)
            yield [matrix().detach() for matrix in matrices]


def two_banks(block: MoEBlock, source: ExpertSource, students: Sequence[PackedExpert]) -> TwoBanks:
    """Install the source's experts and the pruned ones in a layer."""
    layout = source.layouts[block.layer]
    teachers = [decode_expert(layout, raws, None) for _, raws in source.read_layer(block.layer)]
    form = ExpertForm([spec.name for spec in layout.fields], expert_math(block))
    banks = TwoBanks(form, teachers, students)
    install(block, banks)
    return banks


def product_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it, else fp32."""
    features = features_from_system()
    fast = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def distill_experts(
    model: nn.Module,
    banks: Sequence[TwoBanks],
    ids_SC: Tensor,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, int, float], object] = lambda step, steps, loss: None,
) -> DistillReport:
    """Train the students of all layers.

    Args:
        model: the model with its banks installed.
        banks: one for each of its MoE layers, from :func:`two_banks`.
        ids_SC: token ids of the text, pieces of equal length.
        tokens: how many to learn from; the text is repeated where it is shorter.
        dtype: what matrix products are computed in.
        on_step: called after each step with how many are done, how many there are, and the loss.
    """
    model.requires_grad_(False)
    for bank in banks:
        bank.requires_grad_(True)
    learning = [parameter for bank in banks for parameter in bank.parameters() if parameter.numel()]
    batches = list(_batches(ids_SC, tokens))
    config = DistillConfig(len(batches), RATE, warmup=max(1, len(batches) // 10))
    losses: list[float] = []

    def speak(ids_BC: Tensor, teacher: bool) -> Tensor:
        for bank in banks:
            bank.teacher = teacher
        return log_probabilities(model, ids_BC, learning=not teacher, dtype=dtype)

    def after(step: int, loss: float) -> None:
        losses.append(loss)
        on_step(step + 1, len(batches), loss)

    learn(learning, speak, batches, config, after)
    return DistillReport(sum(batch.numel() for batch in batches), _means(losses, 10))


def _batches(ids_SC: Tensor, tokens: int) -> Iterator[Tensor]:
    """Pieces in random order, some at a time, until there are so many tokens (one batch at least)."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, tokens // ids_SC.shape[1])
    rounds = -(-count // len(ids_SC))
    orders = [torch.randperm(len(ids_SC), generator=generator) for _ in range(rounds)]
    chosen = torch.cat(orders)[:count]
    for part in chosen.split(max(1, BATCH_TOKENS // ids_SC.shape[1])):
        yield ids_SC[part]


def _means(values: Sequence[float], parts: int) -> tuple[float, ...]:
    parts = min(parts, len(values))
    edges = [len(values) * number // parts for number in range(parts + 1)]
    return tuple(sum(values[a:b]) / (b - a) for a, b in pairwise(edges))
