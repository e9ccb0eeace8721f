"""Make a model follow a routing trace instead of its own routers, so that a cache meets realistic locality.

Random weights route uniformly, which is the worst case for a cache. A trace recorded from a trained model,
replayed through a random one of the same geometry, shows the other end with the same bytes and the same
arithmetic. The text that comes out means nothing.

The experts are those of a trace that ``gangline trace`` or ``gangline bench --record`` wrote, or are drawn at
random.

Shape suffixes: N tokens of the trace, L MoE layers, K experts per token, T rows of one forward pass, E
experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gangline.core.errors import UsageError
from gangline.core.geometry import MoEGeometry
from gangline.models.adapters import ADAPTERS
from gangline.runtime.runtime import Runtime
from gangline.traces import open_trace


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts successive tokens used.

    Attributes:
        ids_NLK: expert ids; no expert twice for one token in one layer.
        about: where it comes from.
        weights_NLK: mixing weights; None keeps those of the model that replays it.
    """

    ids_NLK: NDArray[np.int32]
    about: str
    weights_NLK: NDArray[np.float32] | None = None


def load_trace(folder: Path) -> RoutingTrace:
    """Read a recorded trace, its tokens in the order in which they were computed.

    Raises:
        TraceError: there is no trace, or it is damaged or holds sums only.
        UsageError: its layers differ in the experts of a token, or tokens left slots empty.
    """
    trace = open_trace(folder)
    layers = [trace.layer(number) for number in trace.layers]
    if len(set(trace.header.top_k)) != 1 or any(layer.keep_RK is not None for layer in layers):
        raise UsageError(
            f"{folder}: not all tokens use the same number of experts in all layers, so it cannot be "
            "replayed; record another model"
        )
    weights = [layer.weights_RK for layer in layers if layer.weights_RK is not None]
    weights_NLK = np.stack(weights, axis=1).astype(np.float32) if len(weights) == len(layers) else None
    ids_NLK = np.stack([layer.ids_RK for layer in layers], axis=1).astype(np.int32)
    return RoutingTrace(ids_NLK, f"recorded from {trace.header.model}", weights_NLK)


def synthetic_trace(
    geometry: MoEGeometry, tokens: int, *, zipf: float = 0.8, repeat: float = 0.4, seed: int = 0
) -> RoutingTrace:
    """Draw a trace with a stated locality.

    Each layer has its own order of popularity. A token keeps each of the previous token's experts with
    probability ``repeat``; the others it draws by popularity, without drawing one twice.

    Args:
        geometry: all layers must have the same top-k.
        tokens: length of the trace.
        zipf: exponent of popularity over its rank; 0 makes all experts alike.
        repeat: chance that an expert of the previous token is used again for that reason alone, 0 to 1.
        seed: of the draw.

    Raises:
        UsageError: layers with different top-k, or numbers out of their range.
    """
    if len({layer.top_k for layer in geometry.layers}) != 1:
        raise UsageError("a synthetic trace needs the same number of experts per token in all layers")
    if tokens < 1 or zipf < 0 or not 0 <= repeat <= 1:
        raise UsageError(
            f"tokens {tokens}, zipf {zipf}, repeat {repeat}: give at least 1, at least 0, and 0 to 1"
        )
    rng = np.random.default_rng(seed)
    layers = [_draw_layer(rng, layer.experts, layer.top_k, tokens, zipf, repeat) for layer in geometry.layers]
    about = f"drawn at random: popularity rank^-{zipf:g}, previous experts kept with probability {repeat:g}"
    return RoutingTrace(np.stack(layers, axis=1), about)


def _draw_layer(
    rng: np.random.Generator, experts: int, top_k: int, tokens: int, zipf: float, repeat: float
) -> NDArray[np.int32]:
    log_popularity_E = -zipf * np.log(rng.permutation(experts) + 1.0)
    # Adding Gumbel noise and taking the largest draws without replacement by popularity.
    score_NE = log_popularity_E + rng.gumbel(size=(tokens, experts))
    kept_NK = rng.random((tokens, top_k)) < repeat
    ids_NK = np.empty((tokens, top_k), dtype=np.int32)
    for n in range(tokens):
        if n:
            score_NE[n, ids_NK[n - 1][kept_NK[n]]] = np.inf
        ids_NK[n] = np.argpartition(-score_NE[n], top_k - 1)[:top_k]
    return ids_NK


def spread_trace(trace: RoutingTrace, geometry: MoEGeometry) -> RoutingTrace:
    """Stretch a trace over a model of another shape, with the locality that it has.

    Layer ``n`` of the model follows the layer at the same relative depth of the trace. Every expert of the
    trace stands for a group of the model's, always the same and of neighbouring ids, all of which a token
    uses that uses the one.

    Args:
        trace: of experts numbered from 0; how many there are is taken from the model's own ``top_k``.
        geometry: of the model; its ``top_k`` is a multiple of the trace's in every layer.

    Raises:
        UsageError: the groups do not come out even, or the trace has more experts than there are groups.
    """
    layers, rows = len(geometry.layers), []
    for number, layer in enumerate(geometry.layers):
        ids_NK = trace.ids_NLK[:, number * trace.ids_NLK.shape[1] // layers]
        size, rest = divmod(layer.top_k, ids_NK.shape[1])
        if rest or (int(ids_NK.max()) + 1) * size > layer.experts:
            raise UsageError(
                f"a trace of {ids_NK.shape[1]} experts per token, the highest of them {int(ids_NK.max())}, "
                f"cannot stand for {layer.top_k} of {layer.experts}; record a model whose experts divide them"
            )
        groups_NKG = ids_NK[:, :, None] * size + np.arange(size, dtype=np.int32)
        rows.append(groups_NKG.reshape(len(ids_NK), -1).astype(np.int32))
    return RoutingTrace(np.stack(rows, axis=1), f"{trace.about}, its experts standing for groups")


def moe_layers(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Return name, experts module and number of experts of every MoE layer, in order."""
    return [
        (name, module, adapter.experts_of(module))
        for name, module in model.named_modules()
        for adapter in ADAPTERS
        if adapter.claims(module)
    ]


@contextmanager
def replay(model: nn.Module, trace: RoutingTrace) -> Iterator[None]:
    """Let every MoE layer use the trace's experts for the rows that it sees, in order, from the start.

    The trace starts again where it ends. Routers still run; what they chose is put aside.

    Args:
        model: plain, loaded or attached.
        trace: of the same number of layers, experts and experts per token.

    Raises:
        UsageError: the trace does not fit the model, or the model hands its choice to its experts in another
            way than as ``(hidden, ids, weights)``.
    """
    layers = moe_layers(model)
    if len(layers) != trace.ids_NLK.shape[1]:
        raise _other_layers(trace, len(layers))
    hooks = [
        module.register_forward_pre_hook(_Follower(name, experts, trace, layer))
        for layer, (name, module, experts) in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def prescribe(runtime: Runtime, trace: RoutingTrace) -> Iterator[None]:
    """Do as :func:`replay` where the engine asks what to compute, so that no module is hooked.

    Args:
        runtime: of a model from ``load`` or ``attach``.
        trace: as for :func:`replay`.

    Raises:
        UsageError: the trace does not fit the model, or its routing is taken over already.
    """
    blocks = runtime.view.blocks
    if len(blocks) != trace.ids_NLK.shape[1]:
        raise _other_layers(trace, len(blocks))
    followers = [
        _Follower(f"layer {block.layer}", layer.experts, trace, block.layer)
        for block, layer in zip(blocks, runtime.geometry.layers, strict=True)
    ]
    end = runtime.reroute(
        lambda layer, ids_TK, weights_TK: followers[layer].follow(ids_TK, weights_TK),
        "its experts are those of a trace",
    )
    try:
        yield
    finally:
        end()


def _other_layers(trace: RoutingTrace, layers: int) -> UsageError:
    return UsageError(
        f"the trace has {trace.ids_NLK.shape[1]} MoE layers, the model {layers}; use a trace of this model"
    )


class _Follower:
    """Replaces the routing of one layer; a forward pre-hook of its experts module."""

    def __init__(self, name: str, experts: int, trace: RoutingTrace, layer: int) -> None:
        self.name = name
        self.ids_NK = torch.from_numpy(trace.ids_NLK[:, layer].astype(np.int64))
        self.weights_NK = None
        if trace.weights_NLK is not None:
            self.weights_NK = torch.from_numpy(trace.weights_NLK[:, layer].copy())
        self.next = 0
        highest = int(self.ids_NK.max())
        if highest >= experts:
            raise UsageError(
                f"the trace uses expert {highest} in {name}, which has {experts}; use a trace of this model"
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) < 3 or not is_choice(args[1]):
            raise UsageError(
                f"{self.name}: {type(module).__name__} does not take (hidden, ids, weights), so no trace can "
                "be replayed through it; use one of the other shapes"
            )
        x_TD, ids_TK, weights_TK, *rest = args
        return (x_TD, *self.follow(ids_TK, weights_TK), *rest)

    def follow(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and weights of the next rows of the trace, in the form of the router's own."""
        if ids_TK.shape[1] != self.ids_NK.shape[1]:
            raise UsageError(
                f"{self.name} uses {ids_TK.shape[1]} experts per token, the trace {self.ids_NK.shape[1]}; "
                "use a trace of this model"
            )
        rows_T = torch.arange(self.next, self.next + ids_TK.shape[0]) % len(self.ids_NK)
        self.next = int(rows_T[-1]) + 1
        if self.weights_NK is not None:
            weights_TK = self.weights_NK[rows_T].to(weights_TK)
        return self.ids_NK[rows_T].to(ids_TK), weights_TK


def is_choice(ids: Any) -> bool:
    """Return whether an argument of an experts module is the ids ``[T, K]`` that its router chose."""
    return isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
