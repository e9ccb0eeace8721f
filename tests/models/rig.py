"""What the tests of this folder share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gangline.models import MoEBlock, MoEView, install, resident_forward
from tiny_models import tiny_inputs


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 0, **shape: int) -> Tensor:
    """Logits of one text-only forward pass in fp32."""
    return model(**tiny_inputs(model, seed=seed, **shape)).logits.float()


@contextmanager
def resident(view: MoEView) -> Iterator[list[tuple[MoEBlock, Tensor, Tensor, Tensor]]]:
    """Install the reference forward on every block; yields what each call got: block, rows, ids, weights."""
    calls: list[tuple[MoEBlock, Tensor, Tensor, Tensor]] = []
    undos = []
    for block in view.blocks:
        undos.append(install(block, _recording(block, calls)))
    try:
        yield calls
    finally:
        for undo in undos:
            undo()


def _recording(block: MoEBlock, calls: list[tuple[MoEBlock, Tensor, Tensor, Tensor]]):
    forward = resident_forward(block)

    def call(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        calls.append((block, x_TD, ids_TK, weights_TK))
        return forward(x_TD, ids_TK, weights_TK)

    return call


def on_meta(model: PreTrainedModel) -> nn.Module:
    """The same model without any weights."""
    with torch.device("meta"):
        return type(model)(model.config)
