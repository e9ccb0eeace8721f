"""One routing decision set: what a cache, a predictor or a recorder sees."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class RoutingEvent:
    """All tokens of one forward pass at one layer, as counts per expert.

    Attributes:
        step: number of the forward pass since the model was loaded.
        layer: index of the MoE layer.
        phase: ``decode`` if every sequence brings one token, else ``prefill``.
        tokens: rows T in this event.
        experts: distinct expert ids, ascending.
        counts: tokens routed to each of ``experts``.
    """

    step: int
    layer: int
    phase: Phase
    tokens: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]
