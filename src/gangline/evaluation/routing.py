"""Where two runs of one model routed differently, and whether rounding explains it.

In half precision two correct runs differ in the last bits, and where a router's choice hangs on those bits
one of them takes another expert (or, in a few families, weighs it quite differently). From there on the row's
logits may differ by more than rounding.

Legend: B sequences, S positions of one call, L positions in all, T = B * S rows, K chosen experts, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flip:
    """The first place of a row where the routing differs.

    Attributes:
        row: sequence of the batch.
        position: token of the sequence, the prompt's included.
        layer: path of the experts module.
        experts: what we chose.
        reference_experts: what the reference chose.
        input_difference: how far the layer's inputs were apart, as a share of their largest value: rounding.
    """

    row: int
    position: int
    layer: str
    experts: tuple[int, ...]
    reference_experts: tuple[int, ...]
    input_difference: float


@dataclass(frozen=True)
class LayerRouting:
    """What one experts module was called with: ``ids_BLK`` ascending, their weights, and the inputs."""

    ids_BLK: Tensor
    weights_BLK: Tensor
    x_BLD: Tensor


Routing = Mapping[str, LayerRouting]
"""By path of the experts module, in layer order."""


@contextmanager
def record_routing(model: Any, names: list[str], batch: int) -> Iterator[dict[str, LayerRouting]]:
    """Note what reaches the experts modules ``names`` of a model while it generates ``batch`` sequences.

    The dictionary is filled when the block ends. A module that is not called with hidden states, ids and
    weights (families without the experts interface) is left out.
    """
    calls: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    runtime = getattr(model, "gangline", None)
    if runtime is not None:  # hooks would keep our native decode step away from the run
        joined: dict[str, LayerRouting] = {}
        with runtime.observed(lambda layer, *event: calls[names[layer]].append(_kept(*event))):
            yield joined
        joined |= _all_joined(calls, batch)
        return
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_noting(seen), with_kwargs=True)
        for name, seen in calls.items()
    ]
    found: dict[str, LayerRouting] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found |= _all_joined(calls, batch)


def _noting(seen: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[..., None]:
    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) >= 3 and not tensors[1].is_floating_point() and tensors[1].dim() == 2:
            seen.append(_kept(*tensors[:3]))

    return note


def _kept(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies on the CPU: a caller may use its tensors again."""
    x, ids, weights = (value.detach().to("cpu", copy=True) for value in (x, ids, weights))
    return x.float(), ids, weights.float()


def _all_joined(
    calls: Mapping[str, list[tuple[Tensor, Tensor, Tensor]]], batch: int
) -> dict[str, LayerRouting]:
    return {
        name: _joined(seen, batch)
        for name, seen in calls.items()
        if seen and all(len(ids) % batch == 0 for _, ids, _ in seen)
    }


def _joined(seen: list[tuple[Tensor, Tensor, Tensor]], batch: int) -> LayerRouting:
    x_BLD, ids_BLK, weights_BLK = (
        torch.cat([call[part].reshape(batch, -1, call[part].shape[-1]) for call in seen], dim=1)
        for part in range(3)
    )
    order = ids_BLK.sort(-1)
    return LayerRouting(order.values, weights_BLK.gather(-1, order.indices), x_BLD)


def first_flip(ours: Routing, reference: Routing, row: int, tolerance: float) -> Flip | None:
    """Return where a row was first routed otherwise than in the reference: first position, then layer.

    Args:
        ours: one run.
        reference: the other.
        row: sequence of the batch.
        tolerance: share of the largest weight by which weights of the same experts may differ.
    """
    first: tuple[int, str] | None = None
    for name in ours:
        if name not in reference:
            continue
        mine, other = ours[name], reference[name]
        apart_LK = (mine.weights_BLK[row] - other.weights_BLK[row]).abs()
        largest_L = other.weights_BLK[row].abs().amax(-1)
        differs_L = (mine.ids_BLK[row] != other.ids_BLK[row]).any(-1) | (
            apart_LK.amax(-1) > tolerance * largest_L
        )
        places = differs_L.nonzero()
        if len(places) and (first is None or int(places[0]) < first[0]):
            first = (int(places[0]), name)
    if first is None:
        return None
    position, name = first
    mine, other = ours[name], reference[name]
    apart = float((mine.x_BLD[row, position] - other.x_BLD[row, position]).abs().max())
    return Flip(
        row=row,
        position=position,
        layer=name,
        experts=tuple(mine.ids_BLK[row, position].tolist()),
        reference_experts=tuple(other.ids_BLK[row, position].tolist()),
        input_difference=apart / (float(other.x_BLD[row, position].abs().max()) or 1.0),
    )
