"""One routing decision set: what a cache, a predictor or a recorder sees.

Shape suffixes: T tokens, K chosen experts per token, E experts, D hidden.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Phase = Literal["prefill", "decode"]

Need = Literal["ids", "weights", "scores", "gate_input", "token_ids", "requests", "embeddings", "future"]
"""What a policy must be given beyond counts. All are fields of :class:`RoutingDetail` but ``future`` and
``embeddings`` (of the input tokens, which predictors get once for each pass)."""


@dataclass(frozen=True, slots=True)
class RoutingDetail:
    """What an event knows about single tokens; made only when a policy or a recorder asks for it.

    Attributes:
        ids_TK: chosen experts of each token.
        weights_TK: their mixing weights.
        scores_TE: the router's scores (softmax or sigmoid) of all experts.
        gate_input_TD: the normalised input of the router, as the model has it (a torch tensor on the model's
            device in the engine, a NumPy array from a trace).
        token_ids_T: input token ids.
        requests_T: number of the request that each token belongs to.
    """

    ids_TK: "NDArray[np.integer] | None" = None
    weights_TK: "NDArray[np.floating] | None" = None
    scores_TE: "NDArray[np.floating] | None" = None
    gate_input_TD: Any = None
    token_ids_T: "NDArray[np.integer] | None" = None
    requests_T: "NDArray[np.integer] | None" = None


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
        detail: single tokens, when somebody asked for them.
    """

    step: int
    layer: int
    phase: Phase
    tokens: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    detail: RoutingDetail | None = field(default=None, compare=False, repr=False)
