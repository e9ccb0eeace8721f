"""The model's own routers as functions, for policies that look at scores or ask a later layer's router.

Shape suffixes: T tokens, D hidden, E experts.
"""

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from gangline.core.errors import UsageError
from gangline.models import MoEBlock, MoEView


class RouterScores:
    """Scores of all experts of one layer, from its router.

    The weights are the model's; the module is a copy without hooks, so that nobody who listens to the model's
    router hears of it. Families whose router reads another input than the experts get approximate scores,
    which is enough for a hint.

    Args:
        block: the layer.

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
        self._sigmoid = block.router_spec is not None and block.router_spec.score == "sigmoid"
        self._token_ids = torch.zeros(1, dtype=torch.long)

    def __call__(self, x_TD: Any) -> NDArray[np.float32]:
        """Return scores ``[T, E]`` (softmax or sigmoid) for inputs ``[T, D]``, of torch or NumPy."""
        x_TD = torch.as_tensor(x_TD).to(self._dtype)
        if len(self._token_ids) != len(x_TD):
            self._token_ids = torch.zeros(len(x_TD), dtype=torch.long)
        with torch.no_grad():
            logits_TE = self._block.adapter.route(self._block, x_TD, self._token_ids).logits_TE.float()
            scores_TE = logits_TE.sigmoid() if self._sigmoid else logits_TE.softmax(-1)
        return cast("NDArray[np.float32]", scores_TE.numpy())


def router_scores(view: MoEView) -> list[RouterScores]:
    """Return the function of every MoE layer.

    Raises:
        UsageError: a layer has no router module.
    """
    return [RouterScores(block) for block in view.blocks]
