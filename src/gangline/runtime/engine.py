"""The experts of a whole model computed from the store: what transformers calls for every MoE layer.

Shape suffixes: T tokens, K chosen experts per token, P pairs, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from gangline.core.errors import StoreError
from gangline.core.events import Phase, RoutingEvent
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.core.tiers import Priority
from gangline.kernels.grouping import Adder, Grouping, group_by_expert
from gangline.kernels.sums import accumulate
from gangline.runtime.event_rules import DENSE_PAIRS_PER_EXPERT, RUN_EXPERTS, RUN_PAIRS_PER_ROW
from gangline.runtime.lease import EventLease
from gangline.runtime.mixed import MixedPrecision, Part
from gangline.runtime.policy_driver import PolicyDriver
from gangline.runtime.store import ExpertStore

Observer = Callable[[int, Tensor, Tensor, Tensor], None]

Layers = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Takes a layer, inputs, ids and weights; returns the weighted sums ``[T, D]``."""

Steps = Callable[["StepRouting"], None]

Reroute = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a layer, ids and weights ``[T, K]`` of its router; returns those to compute."""


class StepRouting(Protocol):
    """What the routers of one native step chose; a new one in every step.

    Attributes:
        ids: of all MoE layers, one ``[T, K]`` after another, int64. weights: the same in fp32.
        rows: T.
    """

    ids: Tensor
    weights: Tensor
    rows: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[T, K]`` and weights ``[T, K]`` of every MoE layer."""


class ExpertKernel(Protocol):
    """Computes experts on bound weights (see ``kernels.reference`` and ``kernels.cpu.native_kernel``)."""

    def bind(self, raws: Sequence[Tensor]) -> Any:
        """Wrap the raw bytes of one expert."""

    def pairs(
        self,
        x_TD: Tensor,
        token_P: Tensor,
        starts: Sequence[int],
        weights: Sequence[Any],
        experts: Sequence[int],
        out_PD: Tensor | None = None,
    ) -> Tensor:
        """Return ``[P, D]`` in fp32: for each pair its expert's output for its token, not yet weighted.

        It is written to ``out_PD``, or to a new tensor. The pairs of ``experts[i]``, whose bound matrices are
        ``weights[i]``, are ``starts[i]:starts[i + 1]``.
        """

    @property
    def adder(self) -> Adder | None:
        """What adds weighted outputs up as it makes them, if the kernel can; else ``pairs`` and a sum do."""


def runs_within(counts: Sequence[int], pairs: int) -> Iterator[tuple[int, int]]:
    """Cut experts into runs ``first:last`` of at most so many pairs; one with more is a run of its own."""
    first = total = 0
    for index, count in enumerate(counts):
        if index > first and total + count > pairs:
            yield first, index
            first, total = index, 0
        total += count
    if first < len(counts):
        yield first, len(counts)


class Engine:
    """Turns ``(x, ids, weights)`` of one layer into the experts' weighted sum.

    Attributes:
        phase: set by the model's forward hook before the layers run.
        observer: called with layer, inputs, ids and weights of every event; its tensors are reused after it.
        on_step: told at once of all layers of a step that the native core computed by itself, in place of
            ``observer``. None keeps each layer in sight of the observer.
        policy: runs predictors and prefetch; None where the composition has neither and its cache looks at
            counts only.
        resident: computes whole layers of a model whose experts all lie on a GPU; then nothing else does.
        reroute: called before anything else happens with an event; may change what is computed.
        mixed: divides events where experts have copies in low precision. Sums then run in ascending expert id
            for one token, and for several through those in high precision before those in low.
    """

    def __init__(self, store: ExpertStore, kernels: Sequence[ExpertKernel], geometry: MoEGeometry) -> None:
        self._store = store
        self._kernels = kernels
        self._layers = geometry.layers
        self._last_layer = len(geometry.layers)
        self._step = 0
        self.phase: Phase = "prefill"
        self.observer: Observer | None = None
        self.on_step: Steps | None = None
        self.policy: PolicyDriver | None = None
        self.reroute: Reroute | None = None
        self.resident: Layers | None = None
        self.mixed: MixedPrecision | None = None

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
        if self.reroute is not None:
            ids_TK, weights_TK = self.reroute(layer, ids_TK, weights_TK)
        if self.resident is not None:
            self.routed(layer, ids_TK, weights_TK)
            if self.observer is not None:
                self.observer(layer, x_TD, ids_TK, weights_TK)
            return self.resident(layer, x_TD, ids_TK, weights_TK)
        self._count_step(layer)
        if self.observer is not None:
            self.observer(layer, x_TD, ids_TK, weights_TK)
        grouping = group_by_expert(ids_TK, weights_TK, self._layers[layer].experts)
        detail = None if self.policy is None else self.policy.detail(layer, x_TD, ids_TK, weights_TK)
        event = RoutingEvent(
            self._step, layer, self.phase, x_TD.shape[0], grouping.experts, grouping.counts, detail
        )
        if self.policy is not None:
            self.policy.routed(event)
        parts = [Part(event, grouping)]
        if self.mixed is not None:
            grouping, parts = self.mixed.divide(event, grouping)
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        if x_TD.shape[0] == 1:
            self._one_token(event, parts, grouping, x_TD, out_TD)
        else:
            self._many_tokens(event, parts, x_TD, out_TD)
        return out_TD.to(x_TD.dtype)

    def routed(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Count the experts of an event that was computed elsewhere, all of them being there for good."""
        self._count_step(layer)
        uses = ids_TK.numel()
        self._store.count_resident(uses if len(ids_TK) == 1 else len(ids_TK.unique()), uses)

    def stepped(self, routing: StepRouting) -> None:
        """Count the experts of a step that the native core computed, all of them being in memory."""
        self._step += 1
        self._last_layer = len(self._layers) - 1
        uses = routing.ids.numel()
        experts = uses if routing.rows == 1 else sum(len(ids_TK.unique()) for ids_TK, _ in routing)
        self._store.count_resident(experts, uses)
        if self.on_step is not None:
            self.on_step(routing)

    @property
    def observed(self) -> bool:
        """Whether somebody sees or changes each event, so that no layer may be computed out of sight."""
        return self.reroute is not None or (self.observer is not None and self.on_step is None)

    @property
    def guided(self) -> bool:
        """Whether somebody must be told of every pass before it begins, or of what it chose."""
        return self.policy is not None or self.observer is not None or self.on_step is not None

    @property
    def next_step(self) -> int:
        """Number of the forward pass that comes next."""
        return self._step + 1

    def step_of(self, layer: int) -> int:
        """Number of the forward pass in which the next event of ``layer`` will be."""
        return self._step + (layer <= self._last_layer)

    def _count_step(self, layer: int) -> None:
        if layer <= self._last_layer:
            self._step += 1
        self._last_layer = layer

    @contextmanager
    def _leased(self, parts: Sequence[Part], *, in_order: bool = False) -> Iterator[list[EventLease]]:
        """Lease all parts of an event, so that no part takes what another has been promised."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    self._store.lease(part.event, in_order=in_order, whole=part.whole, chosen=part.chosen)
                )
                for part in parts
            ]

    def _one_token(
        self, event: RoutingEvent, parts: Sequence[Part], grouping: Grouping, x_1D: Tensor, out_1D: Tensor
    ) -> None:
        """Compute hits first and misses as they arrive; sum when all are there."""
        computed: list[int] = []
        y_PD = torch.empty(len(grouping.experts), x_1D.shape[1], dtype=torch.float32)
        with self._leased(parts) as leases:
            told = self._told(event, leases)
            for part, lease in zip(parts, leases, strict=True):
                kernel = self._kernels[part.event.layer]
                for batch in lease.batches():
                    told = told or self._told(event, leases)
                    batch.sort(key=lambda bound: bound[0])
                    experts = [expert for expert, _ in batch]
                    weights = [bound for _, bound in batch]
                    token_P = grouping.token_P[: len(batch)]  # all zeros: there is one token
                    rows_PD = y_PD[len(computed) : len(computed) + len(batch)]
                    kernel.pairs(x_1D, token_P, range(len(batch) + 1), weights, experts, rows_PD)
                    computed += experts
        if computed != list(grouping.experts):
            y_PD = y_PD[[computed.index(expert) for expert in grouping.experts]]
        accumulate(y_PD, grouping, out_1D)

    def _many_tokens(self, event: RoutingEvent, parts: Sequence[Part], x_TD: Tensor, out_TD: Tensor) -> None:
        """Compute runs of experts in ascending id, and add each run up before the next."""
        with self._leased(parts, in_order=True) as leases:
            told = self._told(event, leases)
            for part, lease in zip(parts, leases, strict=True):
                kernel, index = self._kernels[part.event.layer], 0
                for batch in lease.batches(RUN_EXPERTS, lambda: self._prefetch_next_layer(event, leases)):
                    told = told or self._told(event, leases)
                    counts = part.event.counts[index : index + len(batch)]
                    for first, last in runs_within(counts, RUN_PAIRS_PER_ROW * len(x_TD)):
                        run = part.grouping.part(index + first, index + last)
                        weights = [bound for _, bound in batch[first:last]]
                        if kernel.adder is None:
                            y_PD = kernel.pairs(x_TD, run.token_P, run.starts, weights, run.experts)
                            accumulate(y_PD, run, out_TD)
                        else:
                            kernel.adder(x_TD, run, weights, out_TD)
                    index += len(batch)

    def _told(self, event: RoutingEvent, leases: Sequence[EventLease]) -> bool:
        """Tell the policies of an event once all its misses are requested, so that no prefetch delays one."""
        if self.policy is None:
            return True
        if not all(lease.all_requested for lease in leases):
            return False
        self.policy.after_gate(event)
        return True

    def _prefetch_next_layer(self, event: RoutingEvent, leases: Sequence[EventLease]) -> None:
        """Keep the disk busy across the attention of the next layer, where a prompt will use all experts."""
        following = event.layer + 1
        if event.phase == "decode" or following >= len(self._layers):
            return
        if not all(lease.all_requested for lease in leases):
            return
        geometry = self._layers[following]
        if event.tokens * geometry.top_k < DENSE_PAIRS_PER_EXPERT * geometry.experts:
            return
        everyone = range(geometry.experts)  # all of that layer will be needed: none makes room for another
        for expert in everyone:
            key = ExpertKey(following, expert)
            if not self._store.holds(key) and not self._store.request(
                key, Priority.PREFETCH, spared=everyone
            ):
                return
