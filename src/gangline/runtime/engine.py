"""The experts of a whole model computed from the store: what transformers calls for every MoE layer.

Shape suffixes: T tokens, K chosen experts per token, P pairs, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gangline.core.errors import StoreError
from gangline.core.events import Phase, RoutingEvent
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.kernels.grouping import group_by_expert
from gangline.runtime.store import EventLease, ExpertStore

# A prompt chunk that brings this many pairs per expert uses nearly every expert of the next layer as well.
_DENSE_PAIRS_PER_EXPERT = 2


class ExpertKernel(Protocol):
    """Computes one expert on bound weights (see ``kernels.reference``)."""

    def bind(self, raws: Sequence[Tensor]) -> Any:
        """Wrap the raw bytes of one expert."""

    def __call__(self, x_ND: Tensor, weights: Any, expert: int) -> Tensor:
        """Return ``[N, D]``."""


class Engine:
    """Turns ``(x, ids, weights)`` of one layer into the experts' weighted sum.

    Attributes:
        phase: set by the model's forward hook before the layers run.
    """

    def __init__(self, store: ExpertStore, kernels: Sequence[ExpertKernel], geometry: MoEGeometry) -> None:
        self._store = store
        self._kernels = kernels
        self._layers = geometry.layers
        self._last_layer = len(kernels)
        self._step = 0
        self.phase: Phase = "prefill"

    def layer_forward(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the function that a model's experts module of ``layer`` computes through."""

        def forward(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return self.forward(layer, x_TD, ids_TK, weights_TK)

        return forward

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return ``[T, D]`` in the dtype of ``x_TD``; sums run in fp32 in ascending expert id.

        Raises:
            StoreError: gradients are asked for; the store's weights are read-only.
        """
        if torch.is_grad_enabled() and x_TD.requires_grad:
            raise StoreError(
                "experts in the store cannot be trained; run under torch.no_grad(), "
                "or call gangline.detach(model) first"
            )
        if layer <= self._last_layer:
            self._step += 1
        self._last_layer = layer
        if x_TD.shape[0] == 1:
            return self._one_token(layer, x_TD, ids_TK, weights_TK)
        return self._many_tokens(layer, x_TD, ids_TK, weights_TK)

    def _one_token(self, layer: int, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
        experts = self._layers[layer].experts
        mix = dict(zip(ids_1K[0].tolist(), weights_1K[0].tolist(), strict=True))
        ids = tuple(sorted(e for e in mix if 0 <= e < experts))
        event = RoutingEvent(self._step, layer, self.phase, 1, ids, (1,) * len(ids))
        kernel = self._kernels[layer]
        outputs: dict[int, Tensor] = {}
        with self._store.lease(event) as lease:
            for expert, weights in lease:
                outputs[expert] = kernel(x_1D, weights, expert)
        out_1D = torch.zeros(x_1D.shape, dtype=torch.float32)
        for expert in ids:
            out_1D.add_(outputs[expert], alpha=mix[expert])
        return out_1D.to(x_1D.dtype)

    def _many_tokens(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        grouping = group_by_expert(ids_TK, weights_TK, self._layers[layer].experts)
        event = RoutingEvent(self._step, layer, self.phase, x_TD.shape[0], grouping.experts, grouping.counts)
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        kernel = self._kernels[layer]
        with self._store.lease(event, in_order=True) as lease:
            for index, (expert, weights) in enumerate(lease):
                grouping.add(index, kernel(x_TD[grouping.tokens(index)], weights, expert), out_TD)
                self._prefetch_next_layer(event, lease)
        return out_TD.to(x_TD.dtype)

    def _prefetch_next_layer(self, event: RoutingEvent, lease: EventLease) -> None:
        """Keep the disk busy across the attention of the next layer, where a prompt will use all experts."""
        following = event.layer + 1
        if event.phase == "decode" or not lease.all_requested or following >= len(self._layers):
            return
        geometry = self._layers[following]
        if event.tokens * geometry.top_k < _DENSE_PAIRS_PER_EXPERT * geometry.experts:
            return
        everyone = range(geometry.experts)  # all of that layer will be needed: none makes room for another
        for expert in everyone:
            key = ExpertKey(following, expert)
            if not self._store.holds(key) and not self._store.request(
                key, Priority.PREFETCH, spared=everyone
            ):
                return
