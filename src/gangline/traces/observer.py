"""What the engine or a hook tells those who watch routing.

Shape suffixes: B sequences, S tokens of one pass, T rows, K slots per token, E experts, D hidden.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from gangline.traces.header import Extra


class LayerRouting(NamedTuple):
    """What one layer decided for T rows.

    Attributes:
        ids_TK: chosen experts; an id outside ``[0, E)`` marks an empty slot.
        weights_TK: their mixing weights.
        logits_TE, inputs_TD: the router's logits and input, if the observer wants them.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None = None
    inputs_TD: Tensor | None = None


class StepRouting(Protocol):
    """What all layers decided for the T rows of one pass; nobody changes it afterwards.

    Attributes:
        ids: chosen experts of all layers, one ``[T, K]`` after another. weights: their mixing weights.
        rows: T.
    """

    ids: Tensor
    weights: Tensor
    rows: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids ``[T, K]`` and weights ``[T, K]`` of every MoE layer."""


class RoutingObserver(Protocol):
    """Called in the thread that computes; must not change a tensor, and must copy what it keeps.

    Attributes:
        wants: what must be handed over beside ids and weights.
    """

    wants: Collection[Extra]

    def on_pass(self, ids_BS: Tensor | None, keep_BS: Tensor | None, shape: tuple[int, int]) -> None:
        """A forward pass over ``shape`` = (B, S) tokens begins.

        Args:
            ids_BS: token ids; None where the model was given embeddings.
            keep_BS: False for padding; None if there is none.
            shape: B and S.
        """

    def on_routing(self, layer: int, routing: LayerRouting) -> None:
        """One layer has routed the pass."""

    def on_step(self, routing: StepRouting) -> None:
        """All layers have routed the pass; told in place of :meth:`on_routing` where all is known at once,
        and only if ``wants`` is empty.
        """

    def on_predicted(self, ids_BS: Tensor) -> None:
        """The pass is over; these are the likeliest next tokens (S may be 1: the last position only)."""
