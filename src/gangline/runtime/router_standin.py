"""A router that does not compute: it answers in its family's own form with the choice of a hash table.

Shape suffixes: B sequences, S tokens of one pass, T rows, K slots per token, E experts.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gangline.models import MoEBlock, Undo
from gangline.models.adapters.modules import SwitchAdapter
from gangline.models.adapters.stacked import StackedAdapter, replace_forward

Choice = Callable[[], tuple[Tensor, Tensor] | None]
"""Returns ids and weights ``[T, K]`` for the running pass; None lets the router itself decide."""


def skip_router(block: MoEBlock, choice: Choice) -> Undo | None:
    """Keep a block's router from computing; returns what undoes it, None where the router must go on running.

    The form of its answer is learnt from its first one, so a router is asked once.
    """
    router = block.router
    if router is None:
        return None
    original = router.forward
    if isinstance(block.adapter, SwitchAdapter):

        def masks(x_BSD: Tensor, *args: Any, **kwargs: Any) -> Any:
            chosen = choice()
            if chosen is None:
                return original(x_BSD, *args, **kwargs)
            shape, experts = x_BSD.shape[:-1], block.geometry.experts
            ids_T, weights_T = chosen[0][:, 0], chosen[1][:, 0]
            mask_TE = one_hot(ids_T.clamp(max=experts - 1), experts) * (ids_T < experts).unsqueeze(-1)
            logits_BSE = x_BSD.new_zeros(()).expand(*shape, experts)
            return mask_TE.view(*shape, -1), weights_T.to(x_BSD.dtype).view(*shape, 1), logits_BSE

        return replace_forward(router, masks)
    if getattr(type(block.adapter), "route", None) is not StackedAdapter.route:
        return None
    return replace_forward(router, _Triple(original, block, choice))


class _Triple:
    """Answers ``(logits, weights, ids)`` as most routers do; asks a router that answers otherwise."""

    def __init__(self, original: Callable[..., Any], block: MoEBlock, choice: Choice) -> None:
        self._original, self._block, self._choice = original, block, choice
        self._like: tuple[torch.dtype, torch.dtype, bool] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self._choice()
        x = args[0] if args else kwargs.get("hidden_states")
        if chosen is None or self._like is None or not isinstance(x, Tensor):
            answer = self._original(*args, **kwargs)
            self._learn(answer)
            return answer
        logits_type, weights_type, flat = self._like
        k, experts = self._block.geometry.top_k, self._block.geometry.experts
        ids_TK, weights_TK = (_with_columns(values, k) for values in chosen)
        shape = (len(ids_TK),) if flat else x.shape[:-1]
        logits = torch.zeros((), dtype=logits_type).expand(*shape, experts)
        return logits, weights_TK.to(weights_type).view(*shape, k), ids_TK.view(*shape, k)

    def _learn(self, answer: Any) -> None:
        if not isinstance(answer, tuple) or len(answer) != 3:
            return
        logits, weights, ids = answer
        k = self._block.geometry.top_k
        if all(isinstance(part, Tensor) for part in answer) and weights.shape[-1] == ids.shape[-1] == k:
            self._like = (logits.dtype, weights.dtype, cast(Tensor, ids).dim() == 2)


def _with_columns(values_TK: Tensor, k: int) -> Tensor:
    """Cut or fill to k columns: where the table has another number of experts the engine is told of all."""
    if values_TK.shape[1] >= k:
        return values_TK[:, :k]
    return torch.cat([values_TK, values_TK.new_zeros(len(values_TK), k - values_TK.shape[1])], dim=1)
