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
from gangline.formats.dense import DENSE_NAMES
from gangline.kernels.cpu import native
from gangline.models import MoEBlock, MoEView
from gangline.policies.predictors.next_gate import Ranked


class RouterScores:
    """Scores of all experts of one layer, from its router.

    The weights are the model's; the module is a copy without hooks, so that nobody who listens to the model's
    router hears of it. Families whose router reads another input than the experts get approximate scores,
    which is enough for a hint.

    Args:
        block: the layer.

    Attributes:
        experts: E. dtype: of the router.
        sigmoid: whether scores are sigmoids and no softmax.
        matrix: the native core's view of the router's matrix, whose products are in fp32 for any number of
            tokens and layers at once; None where the scores are torch's.

    Raises:
        UsageError: the family has no router module, or one that reads vectors of another size.
    """

    def __init__(self, block: MoEBlock) -> None:
        if block.router is None:
            raise UsageError(
                f"{block.name} has no router module, which this policy asks; choose another policy"
            )
        weight_ED = block.router._parameters.get("weight")
        if weight_ED is not None and weight_ED.dim() == 2 and weight_ED.shape[1] != block.geometry.hidden:
            raise UsageError(
                f"the router of {block.name} reads {weight_ED.shape[1]} numbers and its experts "
                f"{block.geometry.hidden}, of which this policy knows the latter alone; choose another policy"
            )
        router = copy.copy(block.router)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            object.__setattr__(router, name, OrderedDict())
        self._block = replace(block, router=router)
        self.dtype = next(block.router.parameters()).dtype
        self.experts = block.geometry.experts
        self.sigmoid = block.router_spec is not None and block.router_spec.score == "sigmoid"
        self._token_ids = torch.zeros(1, dtype=torch.long)
        self._weight_ED = self._plain_weight(router)
        self.matrix = self._native_matrix()

    def __call__(self, x_TD: Any) -> NDArray[np.float32]:
        """Return scores ``[T, E]`` (softmax or sigmoid) for inputs ``[T, D]``, of torch or NumPy."""
        x_TD = torch.as_tensor(x_TD)
        if self.matrix is not None:
            return cast("NDArray[np.float32]", _native_scores([self.matrix], self, x_TD)[0].numpy())
        with torch.no_grad():
            x_TD = x_TD.to(self.dtype)
            weight_ED = self._weight_ED
            logits_TE = self._ask(x_TD) if weight_ED is None else functional.linear(x_TD, weight_ED)
            logits_TE = logits_TE.float()
            scores_TE = logits_TE.sigmoid() if self.sigmoid else logits_TE.softmax(-1)
        return cast("NDArray[np.float32]", scores_TE.numpy())

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
        x_TD = torch.randn(4, weight_ED.shape[1], generator=generator).to(self.dtype)
        with torch.no_grad():
            asked_TE, plain_TE = self._ask(x_TD).float(), functional.linear(x_TD, weight_ED).float()
        same = asked_TE.shape == plain_TE.shape and torch.allclose(asked_TE, plain_TE, rtol=1e-2, atol=1e-2)
        return weight_ED.detach() if same else None

    def _native_matrix(self) -> Any:
        """Return the native core's view of the matrix; None where it cannot multiply with it."""
        core: Any = native()
        weight_ED = self._weight_ED
        if core is None or weight_ED is None or weight_ED.dtype not in DENSE_NAMES:
            return None
        if weight_ED.device.type != "cpu" or not weight_ED.is_contiguous():
            return None
        return core.Matrix(weight_ED.data_ptr(), *weight_ED.shape, DENSE_NAMES[weight_ED.dtype])


class RouterGates(list[RouterScores]):
    """The functions of all MoE layers."""

    def several(self, layers: Sequence[int], x_TD: Any) -> Sequence[NDArray[np.float32]]:
        """Return the scores ``[T, E]`` of some layers for one input: the same values in fewer calls."""
        together_LTE = self._together(layers, x_TD)
        if together_LTE is None:
            return [self[layer](x_TD) for layer in layers]
        return list(together_LTE.numpy())

    def ranked(self, layers: Sequence[int], x_1D: Any) -> Sequence[Ranked] | None:
        """Return the experts of some layers for one token, or None where :meth:`several` must do."""
        together_LTE = self._together(layers, x_1D)
        if together_LTE is None:
            return None
        count, _, experts = together_LTE.shape
        core: Any = native()
        ranked: list[Ranked] = core.rank_rows(together_LTE.data_ptr(), count, experts)
        return ranked

    def _together(self, layers: Sequence[int], x_TD: Any) -> Tensor | None:
        """Return the scores ``[layers, T, E]`` by one native product; None where there is none."""
        asked = [self[layer] for layer in layers]
        if len({(one.matrix is None, one.experts, one.dtype, one.sigmoid) for one in asked}) > 1 or not asked:
            return None
        if asked[0].matrix is None:
            return None
        return _native_scores([one.matrix for one in asked], asked[0], torch.as_tensor(x_TD))


def plain_routers(view: MoEView) -> bool:
    """Whether every router is a module with one matrix for what the experts read: soon asked."""
    wanted = [(layer.experts, layer.hidden) for layer in view.geometry.layers]
    for block, shape in zip(view.blocks, wanted, strict=True):
        weight_ED = None if block.router is None else block.router._parameters.get("weight")
        if weight_ED is None or tuple(weight_ED.shape) != shape:
            return False
    return True


def _native_scores(matrices: Sequence[Any], like: RouterScores, x_TD: Tensor) -> Tensor:
    """Return scores ``[matrices, T, E]`` in fp32; all matrices are ``like`` one router's."""
    core: Any = native()
    x_TD = x_TD.detach().float().contiguous()
    tokens, count = x_TD.shape[0], len(matrices)
    scores_LTE = torch.empty(count, tokens, like.experts)
    token_P = torch.arange(tokens).repeat(count) if tokens > 1 else torch.zeros(count, dtype=torch.long)
    starts = range(0, (count + 1) * tokens, tokens)
    core.grouped_products(
        matrices,
        x_TD.data_ptr(),
        "f32",
        tokens,
        token_P.data_ptr(),
        starts,
        scores_LTE.data_ptr(),
        like.experts,
    )
    core.score_rows(scores_LTE.data_ptr(), count * tokens, like.experts, like.sigmoid)
    return scores_LTE


def router_scores(view: MoEView) -> RouterGates:
    """Return the function of every MoE layer.

    Raises:
        UsageError: a layer has no router module.
    """
    return RouterGates(RouterScores(block) for block in view.blocks)
