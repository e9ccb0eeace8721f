"""Which model a predictor was trained for, and the refusal of another one.

A file of the right sizes may belong to another model: its forecasts would be worthless as hints, and its
choices ruinous where they are executed. The signs of the routers' weights tell models apart and survive a
conversion between number formats.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gangline.core.errors import UsageError

if TYPE_CHECKING:
    from gangline.models import MoEBlock, MoEView

_TRAIN = "train one for this model with 'gangline predict train'"


def describe_model(view: "MoEView", name: str, blocks: "Sequence[MoEBlock] | None" = None) -> dict[str, Any]:
    """Return what a predictor's ``about`` says of its model.

    Args:
        view: the model.
        name: what the user calls it.
        blocks: the layers that are predicted, by default all.
    """
    chosen = view.blocks if blocks is None else blocks
    return {
        "model": name,
        "family": view.family,
        "layers": [
            {"name": b.name, "experts": b.geometry.experts, "top_k": b.geometry.top_k} for b in chosen
        ],
        "hidden": chosen[0].geometry.hidden,
        "routers": router_signs(chosen),
    }


def router_signs(blocks: "Sequence[MoEBlock]") -> str | None:
    """Return a hash of the signs of all router weights; None where a router's weights cannot be seen."""
    digest = hashlib.sha256()
    for block in blocks:
        weights = [] if block.router is None else [p for p in block.router.parameters() if p.dim() > 1]
        if not weights or any(p.is_meta or not p.is_floating_point() for p in weights):
            return None
        for weight in weights:
            digest.update(np.packbits(torch.signbit(weight.detach()).cpu().numpy()).tobytes())
    return digest.hexdigest()


def require_same_model(about: Mapping[str, Any], view: "MoEView", path: Any) -> list[int]:
    """Return the indices of the layers that a predictor speaks of.

    Args:
        about: of the saved predictor.
        view: the model that it shall serve.
        path: the predictor's file, for the message.

    Raises:
        UsageError: it was trained for another model, or its file does not say for which.
    """
    layers = about.get("layers")
    if not isinstance(layers, list) or not layers:
        raise UsageError(f"{path} does not say which model it was trained for; {_TRAIN}")
    trained = f"{path} was trained for {about.get('model')} ({about.get('family')})"
    by_name = {block.name: block for block in view.blocks}
    for layer in layers:
        block = by_name.get(layer["name"])
        if block is None:
            raise UsageError(f"{trained}: {view.family} has no layer {layer['name']}; {_TRAIN}")
        sizes = (block.geometry.experts, block.geometry.top_k)
        if sizes != (layer["experts"], layer["top_k"]):
            raise UsageError(
                f"{trained}: layer {block.layer} has {sizes[0]} experts, {sizes[1]} a token, "
                f"not {layer['experts']} and {layer['top_k']}; {_TRAIN}"
            )
    blocks = [by_name[layer["name"]] for layer in layers]
    signs = router_signs(blocks)
    if about.get("routers") and signs and about["routers"] != signs:
        raise UsageError(f"{trained}: the routers of this model are others; {_TRAIN}")
    return [block.layer for block in blocks]
