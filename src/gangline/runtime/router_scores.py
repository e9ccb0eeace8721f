"""The model's own routers as functions, for policies that look at scores or ask a later layer's router.

Shape suffixes: T tokens, D hidden, E experts.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from gangline.core.errors import UsageError
from gangline.models import MoEBlock, MoEView


class RouterScores:
    """Scores of all experts of one layer, from its router.

    The weights are the model's; the module is a copy without hooks, so that nobody who listens to the model's
    router hears of it. Families whose router reads another input than the experts get approximate scores,
    which is enough for a hint.

    Args:
        block: the layer.

    Attributes:
        sigmoid: whether scores are sigmoids and no softmax.

    Raises:
        UsageError: the family has no router module.
    """

    def __init__(self, block: MoEBlock) -> None:
        if block.router is None:
            raise UsageError(
                f"{block.name} has no router module, which this policy asks; choose another policy"
            )
        router = copy.copy(block.router)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            object.__setattr__(router, name, OrderedDict())
        self._block = replace(block, router=router)
        self._dtype = next(block.router.parameters()).dtype
        self.sigmoid = block.router_spec is not None and block.router_spec.score == "sigmoid"
        self._token_ids = torch.zeros(1, dtype=torch.long)
        self._weight_ED = self._plain_weight(router)

    def __call__(self, x_TD: Any) -> NDArray[np.float32]:
        """Return scores ``[T, E]`` (softmax or sigmoid) for inputs ``[T, D]``, of torch or NumPy."""
        with torch.no_grad():
            return self.normalised(self.logits(torch.as_tensor(x_TD)))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return what the router makes scores of, ``[T, E]``."""
        if x_TD.dtype is not self._dtype:
            x_TD = x_TD.to(self._dtype)
        return self._ask(x_TD) if self._weight_ED is None else functional.linear(x_TD, self._weight_ED)

    def normalised(self, logits: Tensor) -> NDArray[np.float32]:
        """Return scores of logits, of any layers and tokens: the last dimension counts experts."""
        logits = logits.float()
        return cast("NDArray[np.float32]", (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).numpy())

    def _ask(self, x_TD: Tensor) -> Tensor:
        """Return the logits that the router module gives."""
        if len(self._token_ids) != len(x_TD):
            self._token_ids = torch.zeros(len(x_TD), dtype=torch.long)
        return self._block.adapter.route(self._block, x_TD, self._token_ids).logits_TE

    def _plain_weight(self, router: nn.Module) -> Tensor | None:
        """Return the router's matrix if its logits are that times the input: a product instead of a call."""
        weight_ED = router._parameters.get("weight")
        if weight_ED is None or weight_ED.dim() != 2 or weight_ED.is_meta:
            return None
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(4, weight_ED.shape[1], generator=generator).to(self._dtype)
        with torch.no_grad():
            asked_TE, plain_TE = self._ask(x_TD).float(), functional.linear(x_TD, weight_ED).float()
        same = asked_TE.shape == plain_TE.shape and torch.allclose(asked_TE, plain_TE, rtol=1e-2, atol=1e-2)
        return weight_ED.detach() if same else None


class RouterGates(list[RouterScores]):
    """The functions of all MoE layers."""

    def several(self, layers: Sequence[int], x_TD: Any) -> Sequence[NDArray[np.float32]]:
        """Return the scores ``[T, E]`` of some layers for one input: the same values in fewer calls."""
        asked, x_TD = [self[layer] for layer in layers], torch.as_tensor(x_TD)
        with torch.no_grad():
            logits = [gate.logits(x_TD) for gate in asked]
            if len({(one.shape[-1], gate.sigmoid) for one, gate in zip(logits, asked, strict=True)}) == 1:
                return asked[0].normalised(torch.stack(logits))  # type: ignore[return-value]
            return [gate.normalised(one) for one, gate in zip(logits, asked, strict=True)]


def router_scores(view: MoEView) -> RouterGates:
    """Return the function of every MoE layer.

    Raises:
        UsageError: a layer has no router module.
    """
    return RouterGates(RouterScores(block) for block in view.blocks)
