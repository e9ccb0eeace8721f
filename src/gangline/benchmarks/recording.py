"""Record which experts a model uses, as a trace that :func:`~gangline.benchmarks.replay.replay` plays back.

Shape suffixes: N tokens of the trace, L MoE layers, K experts per token, T rows of one forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gangline.benchmarks.replay import RoutingTrace, is_choice, moe_layers
from gangline.core.errors import UsageError


class Recorder:
    """What the routers of a model chose so far; made by :func:`record`."""

    def __init__(self, layers: list[str]) -> None:
        self._names = layers
        self._ids: list[list[NDArray[np.int32]]] = [[] for _ in layers]
        self._weights: list[list[NDArray[np.float32]]] = [[] for _ in layers]

    def note(self, layer: int, args: tuple[Any, ...]) -> None:
        """Take down one call of the experts of a layer.

        Raises:
            UsageError: the model does not hand ``(hidden, ids, weights)`` to its experts.
        """
        if len(args) < 3 or not is_choice(args[1]):
            raise UsageError(
                f"{self._names[layer]} does not take (hidden, ids, weights), so its routing cannot be "
                "recorded; record another model"
            )
        self._ids[layer].append(args[1].numpy(force=True).astype(np.int32))
        self._weights[layer].append(args[2].float().numpy(force=True))

    def trace(self, about: str) -> RoutingTrace:
        """Return everything recorded, tokens in the order in which they were computed.

        Args:
            about: a sentence on where it comes from.

        Raises:
            UsageError: nothing was recorded, or layers saw different tokens or chose different numbers.
        """
        shapes = {tuple(np.concatenate(ids).shape) if ids else None for ids in self._ids}
        if len(shapes) != 1 or None in shapes:
            raise UsageError(
                f"the {len(self._ids)} MoE layers did not all see the same tokens with the same top-k, and a "
                "trace has one row per token for all layers; record another model"
            )
        ids_NLK = np.stack([np.concatenate(ids) for ids in self._ids], axis=1)
        weights_NLK = np.stack([np.concatenate(weights) for weights in self._weights], axis=1)
        return RoutingTrace(ids_NLK, "recorded", about, weights_NLK)


@contextmanager
def record(model: nn.Module) -> Iterator[Recorder]:
    """Take down the choice of every MoE layer of ``model`` inside the block; nothing else changes."""
    layers = moe_layers(model)
    recorder = Recorder([name for name, _, _ in layers])

    def watcher(layer: int) -> Any:
        return lambda module, args: recorder.note(layer, args)

    hooks = [module.register_forward_pre_hook(watcher(layer)) for layer, (_, module, _) in enumerate(layers)]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
