"""Tiny checkpoints on disk, text for them, and correlated inputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gangline.compress.sparsify.moments import Moments
from tiny_models import tiny_model


def save_tiny(family: str, folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny random model of a family, written to a folder."""
    model = tiny_model(family, seed=seed).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def correlated(tokens: int, columns: int) -> Tensor:
    """Inputs that have something to say about one another."""
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) / columns**0.5


def moments_of(x_NI: Tensor, damping: float = 0.01) -> Moments:
    """Moments of inputs that all count the same."""
    return Moments.of(x_NI, torch.ones(len(x_NI)), damping)
