"""The name of one expert."""

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert: the index of its MoE layer (0-based, counting MoE layers only) and its id there."""

    layer: int
    expert: int


def low_copy(key: ExpertKey, layers: int) -> ExpertKey:
    """Return the name of the copy in low precision of an expert of a model with so many MoE layers.

    Copies are numbered like the experts of further layers behind the last one, so that tables, files and
    slots need no second kind of key.
    """
    return ExpertKey(layers + key.layer, key.expert)
