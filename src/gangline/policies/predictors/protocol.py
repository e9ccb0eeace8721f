"""The protocol of predictors: hints about coming layers, never a replacement of the router."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from gangline.core.events import Need, RoutingEvent
from gangline.core.forecast import Forecast


class Predictor(Protocol):
    """Says which experts coming layers will use. Derive from it to get empty answers for what is not known.

    The order of calls: ``on_request`` when the tokens of a forward pass are known and before layer 0 (a
    prompt or the token just sampled); per layer ``before_attention``, then ``after_gate`` with the true event
    (which is also where it learns); ``end_step`` after the last layer; ``end_request`` when a sequence is
    complete.

    Attributes:
        exact: True, for a hint cannot change the output.
        needs: what events must carry; ``future`` for oracles.
    """

    exact: bool = True
    needs: Collection[Need] = frozenset()

    def on_request(self, step: int, token_ids: Sequence[int], embeddings_TD: Any = None) -> list[Forecast]:
        """Forecast from the input tokens of pass ``step`` alone."""
        return []

    def before_attention(self, step: int, layer: int, x_TD: Any) -> list[Forecast]:
        """Forecast from the hidden state that enters block ``layer``."""
        return []

    def after_gate(self, event: RoutingEvent) -> list[Forecast]:
        """Learn from the true routing of a layer and forecast later ones."""
        return []

    def end_step(self, step: int) -> list[Forecast]:
        """Forecast the next pass after the last layer of pass ``step``."""
        return []

    def end_request(self) -> None:
        """Note that a sequence is complete."""
        return None
