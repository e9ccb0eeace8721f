"""Tiny models behind the native step, with experts whose bits depend on one row alone.

Shape suffixes: B sequences, P positions, T rows, V vocabulary, H key/value heads, d head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gangline.kernels.cpu.native_kernel import NativeKernel
from gangline.kernels.grouping import group_by_expert
from gangline.kernels.sums import accumulate
from gangline.models import MoEView, expert_math, expert_tensors, find_moe, resident_forward, stored_fields
from gangline.runtime.native_decode import NativeDecode, enable_native_decode
from tiny_models import tiny_model

DEMANDED = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
ALSO = ["dots1", "glm4_moe", "gpt_oss", "hy_v3", "minimax_m2", "solar_open"]


class RowByRow:
    """The experts by the torch reference, a row at a time: torch's products of many rows round otherwise."""

    observed = False
    guided = False

    def __init__(self, view: MoEView) -> None:
        self._layers = [resident_forward(block) for block in view.blocks]
        self.events: list[tuple[int, Tensor]] = []

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        self.events.append((layer, ids_TK.clone()))
        rows = zip(x_TD.split(1), ids_TK.split(1), weights_TK.split(1), strict=True)
        return torch.cat([self._layers[layer](*row) for row in rows])

    def stepped(self, routing: Any) -> None:
        self.events += [(layer, ids_TK.clone()) for layer, (ids_TK, _) in enumerate(routing)]


class ModuleExperts:
    """The experts as the model holds them, by the torch reference."""

    def __init__(self, view: MoEView) -> None:
        self._layers = [resident_forward(block) for block in view.blocks]
        self.events: list[tuple[int, Tensor]] = []

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        self.events.append((layer, ids_TK))
        return self._layers[layer](x_TD, ids_TK, weights_TK)

    observed = False
    guided = False

    def stepped(self, routing: Any) -> None:
        self.events += [(layer, ids_BK) for layer, (ids_BK, _) in enumerate(routing)]


class NativeExperts(ModuleExperts):
    """The experts on native kernels, bound to the model's own tensors."""

    def __init__(self, view: MoEView, dtype: torch.dtype) -> None:
        super().__init__(view)
        self._kernels = [NativeKernel(stored_fields(b, dtype), expert_math(b)) for b in view.blocks]
        self._experts = [b.geometry.experts for b in view.blocks]
        self._weights = [
            [
                kernel.bind(
                    [t.detach().contiguous().view(torch.uint8).reshape(-1) for t in expert_tensors(b, e)]
                )
                for e in range(b.geometry.experts)
            ]
            for kernel, b in zip(self._kernels, view.blocks, strict=True)
        ]

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        self.events.append((layer, ids_TK))
        grouping = group_by_expert(ids_TK, weights_TK, self._experts[layer])
        weights = [self._weights[layer][e] for e in grouping.experts]
        y_PD = self._kernels[layer].pairs(x_TD, grouping.token_P, grouping.starts, weights, grouping.experts)
        out_TD = torch.zeros(x_TD.shape)
        accumulate(y_PD, grouping, out_TD)
        return out_TD

    def table(self) -> list[tuple[Any, list[Any]]]:
        return [
            (kernel.layer, [kernel.expert(w, e) for e, w in enumerate(weights)])
            for kernel, weights in zip(self._kernels, self._weights, strict=True)
        ]


def build(family: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, NativeDecode]:
    """Return a tiny model and its native step, which serves prompts too."""
    model = tiny_model(family, seed=seed, dtype=dtype)
    view = find_moe(model)
    step = enable_native_decode(model, view, RowByRow(view))
    assert step is not None
    step.serves_prompts = True
    return model, step


@dataclass
class Fed:
    """What a model made of some tokens: the logits after each piece, and the cache."""

    logits: list[Tensor]
    cache: DynamicCache

    def keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """``[B, H, P, d]`` of every layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]


@torch.no_grad()
def feed(model: Any, ids_BP: Tensor, mask_BP: Tensor, pieces: Sequence[int], **more: Any) -> Fed:
    """Feed tokens in pieces of so many positions, with the positions that ``generate`` would give."""
    positions_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
    fed, begin = Fed([], DynamicCache(config=model.config)), 0
    for size in pieces:
        end = begin + size
        out = model(
            ids_BP[:, begin:end],
            attention_mask=mask_BP[:, :end],
            position_ids=positions_BP[:, begin:end],
            past_key_values=fed.cache,
            logits_to_keep=1,
            **more,
        )
        assert out.logits.shape[1] == 1 and out.past_key_values is fed.cache
        fed.logits.append(out.logits[:, -1])
        begin = end
    assert begin == ids_BP.shape[1] == fed.cache.get_seq_length()
    return fed


def same(one: Fed, other: Fed, first_B: Sequence[int]) -> bool:
    """Whether logits and all positions from ``first_B`` on are the same to the last bit."""
    for ours, theirs in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if not all(
                torch.equal(a[row, :, first:], b[row, :, first:]) for row, first in enumerate(first_B)
            ):
                return False
    return torch.equal(one.logits[-1], other.logits[-1])
