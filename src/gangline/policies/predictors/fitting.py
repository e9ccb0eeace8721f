"""The training loop that learned predictors share: Adam over batches, on the CPU, repeatable."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")
Progress = Callable[[int, float], None]
"""Called after each step with its number (from 1) and its loss."""


def fit(
    module: nn.Module,
    batches: Sequence[Batch],
    loss: Callable[[Batch], Tensor],
    *,
    epochs: int,
    lr: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Minimise ``loss`` over ``batches``, shuffled anew in every epoch.

    Args:
        module: what is trained; left in evaluation mode.
        batches: whatever ``loss`` takes.
        loss: scalar loss of one batch.
        epochs: passes over the batches.
        lr: learning rate of Adam.
        seed: of the order of batches.
        progress: told every step.

    Returns:
        Mean loss of the last epoch.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    module.train()
    step, mean = 0, 0.0
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(batches), generator=order).tolist():
            optimizer.zero_grad()
            value = loss(batches[index])
            value.backward()
            optimizer.step()
            step, total = step + 1, total + value.item()
            if progress is not None:
                progress(step, value.item())
        mean = total / max(1, len(batches))
    module.eval()
    return mean
