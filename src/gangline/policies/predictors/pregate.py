"""Pre-gates: the gate of a block chooses the experts of the next one.

"Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference" (arXiv
2308.12066). Block 0 has its own gate and one for block 1; every block's gate serves the next; the last has
none. The paper starts from the trained model and fine-tunes it with this wiring (2048 steps, lr 1e-4).
:class:`PreGates` are those gates; they begin as copies of the gates that they stand for and are distilled
towards them, which makes them a hint for a model that was not fine-tuned. :class:`PreGatedRouting` is the
paper's wiring itself, for a model that was: it changes the output of any other.

Shape suffixes: T tokens, D hidden, E experts, K choices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gangline.core.errors import UsageError
from gangline.policies.predictors.fitting import Progress, fit
from gangline.policies.predictors.next_gate import NextGate


class PreGates(nn.Module):
    """One linear gate for each block but the last, for the block that follows.

    Args:
        gates_ED: weights of the model's own gates, one ``[E, D]`` for each block.
    """

    def __init__(self, gates_ED: Sequence[Tensor]) -> None:
        super().__init__()
        self.gates = nn.ParameterList(nn.Parameter(w_ED.detach().float().clone()) for w_ED in gates_ED[1:])

    def forward(self, block: int, x_TD: Tensor) -> Tensor:
        """Return logits ``[T, E]`` of block ``block + 1`` from the gate input of ``block``."""
        return functional.linear(x_TD.float(), self.gates[block])


Sample = tuple[int, Tensor, Tensor]
"""A block, its gate inputs ``[T, D]`` and the next block's router logits ``[T, E]``."""


def train_pregates(
    pregates: PreGates,
    samples: Sequence[Sample],
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Distil the gates (Kullback-Leibler divergence); returns the mean loss of the last epoch."""

    def loss(sample: Sample) -> Tensor:
        block, x_TD, teacher_TE = sample
        student_TE = pregates(block, x_TD).log_softmax(-1)
        return functional.kl_div(
            student_TE, teacher_TE.float().log_softmax(-1), log_target=True, reduction="batchmean"
        )

    return fit(pregates, samples, loss, epochs=epochs, lr=lr, seed=seed, progress=progress)


class PreGatePredictor(NextGate):
    """Trained pre-gates as a hint for the next layer.

    Args:
        pregates: trained gates.
        top_k: if given, tokens vote with their top-k scores only.
    """

    source = "pre-gate"

    def __init__(self, pregates: PreGates, top_k: int | None = None) -> None:
        def gate(block: int) -> Callable[[Any], Any]:
            def scores(x_TD: Any) -> Any:
                with torch.no_grad():
                    return pregates(block, torch.as_tensor(x_TD)).softmax(-1).numpy()

            return scores

        self.pregates = pregates
        first: list[Callable[[Any], Any]] = [lambda x_TD: x_TD]  # block 0 is never asked for
        super().__init__(first + [gate(block) for block in range(len(pregates.gates))], 1, top_k)


Choice = tuple[Tensor, Tensor]
"""Experts ``[T, K]`` and their mixing weights ``[T, K]``."""


class PreGatedRouting:
    """Routing one block late: ids and weights of block N+1 are those made in block N. Approximate.

    Args:
        own: chooses for block 0 from its gate input.
        pre: ``pre(block, x_TD)`` chooses for ``block + 1``.
        blocks: MoE blocks.
    """

    exact = False

    def __init__(
        self, own: Callable[[Tensor], Choice], pre: Callable[[int, Tensor], Choice], blocks: int
    ) -> None:
        self.own, self.pre, self.blocks = own, pre, blocks
        self._made: tuple[int, Choice] | None = None

    def route(self, block: int, x_TD: Tensor) -> tuple[Choice, Choice | None]:
        """Return what ``block`` executes, and the next block's choice (None at the last block).

        Raises:
            UsageError: the block before was not routed in this pass.
        """
        if block == 0:
            chosen = self.own(x_TD)
        elif self._made is None or self._made[0] != block:
            raise UsageError(
                f"block {block} has no choice from block {block - 1}; route the blocks of a pass in order"
            )
        else:
            chosen = self._made[1]
        coming = self.pre(block, x_TD) if block + 1 < self.blocks else None
        self._made = None if coming is None else (block + 1, coming)
        return chosen, coming
