"""The name of one expert."""

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One routed expert: the index of its MoE layer (0-based, counting MoE layers only) and its id there."""

    layer: int
    expert: int
