"""Make a model follow a routing trace instead of its own routers, so that a cache meets realistic locality.

Random weights route uniformly, which is the worst case for a cache. A trace recorded from a trained model,
replayed through a random one of the same geometry, shows the other end with the same bytes and the same
arithmetic. The text that comes out means nothing.

File format (``.npz``): ``ids`` int [N, L, K], the experts of N successive tokens in L MoE layers; optionally
``weights`` float [N, L, K]; ``kind``, ``recorded`` or ``synthetic``; ``about``, a sentence on where it
comes from.

Shape suffixes: N tokens of the trace, L MoE layers, K experts per token, T rows of one forward pass, E
experts.
"""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gangline.core.errors import UsageError
from gangline.core.geometry import MoEGeometry
from gangline.models.adapters import ADAPTERS

TraceKind = Literal["recorded", "synthetic"]


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts successive tokens used.

    Attributes:
        ids_NLK: expert ids; no expert twice for one token in one layer.
        kind: ``recorded`` from a model's own routers, or ``synthetic``.
        about: where it comes from.
        weights_NLK: mixing weights; None keeps those of the model that replays it.
    """

    ids_NLK: NDArray[np.int32]
    kind: TraceKind
    about: str
    weights_NLK: NDArray[np.float32] | None = None

    def save(self, path: Path) -> None:
        """Write the trace as ``.npz``; it appears under its name only when complete.

        Raises:
            UsageError: the file cannot be written.
        """
        arrays: dict[str, Any] = {"ids": self.ids_NLK, "kind": self.kind, "about": self.about}
        if self.weights_NLK is not None:
            arrays["weights"] = self.weights_NLK
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            part.replace(path)
        except OSError as error:
            raise UsageError(
                f"cannot write the trace {path} ({error.strerror}); name another place"
            ) from error
        finally:
            part.unlink(missing_ok=True)


def load_trace(path: Path) -> RoutingTrace:
    """Read a trace.

    Raises:
        UsageError: the file is missing, is not such an ``.npz``, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids_NLK = file["ids"]
            kind, about = str(file["kind"]), str(file["about"])
            weights_NLK = file.get("weights")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is not a routing trace ({error}); record it again or make a synthetic one"
        ) from error
    if ids_NLK.ndim != 3 or 0 in ids_NLK.shape or ids_NLK.dtype.kind not in "iu" or ids_NLK.min() < 0:
        raise UsageError(
            f"{path}: ids must be whole numbers [tokens, layers, top-k], not {ids_NLK.shape}; record it again"
        )
    if kind not in get_args(TraceKind):
        raise UsageError(f"{path}: kind {kind!r} must be recorded or synthetic; record it again")
    if weights_NLK is not None and weights_NLK.shape != ids_NLK.shape:
        raise UsageError(
            f"{path}: weights {weights_NLK.shape} do not fit ids {ids_NLK.shape}; record it again"
        )
    weights_NLK = None if weights_NLK is None else weights_NLK.astype(np.float32)
    return RoutingTrace(
        ids_NLK.astype(np.int32), "recorded" if kind == "recorded" else "synthetic", about, weights_NLK
    )


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
    return RoutingTrace(np.stack(layers, axis=1), "synthetic", about)


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
        raise UsageError(
            f"the trace has {trace.ids_NLK.shape[1]} MoE layers, the model {len(layers)}; "
            "use a trace of this model"
        )
    hooks = [
        module.register_forward_pre_hook(_Follower(name, experts, trace, layer))
        for layer, (name, module, experts) in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
        if ids_TK.shape[1] != self.ids_NK.shape[1]:
            raise UsageError(
                f"{self.name} uses {ids_TK.shape[1]} experts per token, the trace {self.ids_NK.shape[1]}; "
                "use a trace of this model"
            )
        rows_T = torch.arange(self.next, self.next + ids_TK.shape[0]) % len(self.ids_NK)
        self.next = int(rows_T[-1]) + 1
        if self.weights_NK is not None:
            weights_TK = self.weights_NK[rows_T].to(weights_TK)
        return (x_TD, self.ids_NK[rows_T].to(ids_TK), weights_TK, *rest)


def is_choice(ids: Any) -> bool:
    """Return whether an argument of an experts module is the ids ``[T, K]`` that its router chose."""
    return isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
