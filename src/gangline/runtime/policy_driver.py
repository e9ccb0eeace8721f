"""Runs a composition beside the engine: predictors, prefetch, and what events must carry for them.

The order around one event is the simulator's: reads that came to nothing lose their turn; hits are decided
and misses requested; then predictors see the event, caches hear their forecasts, and the prefetcher queues
reads behind everything that somebody waits for.

Shape suffixes: B sequences, S tokens of one pass, T rows, K chosen experts, E experts, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies.parts import Parts
from gangline.policies.predictors.next_gate import Gate
from gangline.policies.predictors.protocol import Predictor
from gangline.policies.predictors.registry import Silent
from gangline.runtime.store import ExpertStore

Embed = Callable[[Tensor], Tensor]
"""Takes token ids ``[B, S]`` and returns the model's input embeddings ``[B, S, D]``."""


class PolicyDriver:
    """Calls the parts at the right points. One forward pass at a time.

    Args:
        store: whose caches are those of ``parts``.
        parts: fresh ones.
        geometry: the model's MoE layers.
        slots: expert slots in all.
        gates: scores of each layer's experts; needed only if events must carry scores.
        embed: the model's input embedding; needed only if the predictor wants embeddings.
    """

    def __init__(
        self,
        store: ExpertStore,
        parts: Parts,
        geometry: MoEGeometry,
        slots: int,
        *,
        gates: Sequence[Gate] | None = None,
        embed: Embed | None = None,
    ) -> None:
        self._store = store
        self._predictor: Predictor = parts.predictor or Silent()
        self._prefetcher = parts.prefetcher
        self._needs = parts.needs
        self._details = parts.needs - {"embeddings"}
        self._slots = slots
        self._layers = len(geometry.layers)
        self._last_layer = self._layers - 1
        self._top_k = max(layer.top_k for layer in geometry.layers)
        self._gates, self._embed = gates, embed
        self._queued: set[ExpertKey] = set()
        self._token_ids_T: NDArray[Any] | None = None
        self._begun = False

    @property
    def sees_hidden(self) -> bool:
        """Whether the predictor looks at what enters a decoder layer."""
        return type(self._predictor).before_attention is not Predictor.before_attention

    def begin_pass(self, step: int, ids_BS: Tensor | None, *, new: bool) -> None:
        """A forward pass begins.

        Args:
            step: number that its events will have.
            ids_BS: its token ids; None where the model is given embeddings.
            new: whether it begins new sequences.
        """
        if new:
            if self._begun:
                self._store.end_request()
                self._predictor.end_request()
            self._begun = True
            self._store.begin_request()
        self._token_ids_T = None
        if ids_BS is None or type(self._predictor).on_request is Predictor.on_request:
            return
        self._token_ids_T = ids_BS.reshape(-1).numpy()
        embeddings_TD = None
        if "embeddings" in self._needs and self._embed is not None:
            embeddings_TD = self._embed(ids_BS).detach().float().flatten(0, 1)
        self._act(self._predictor.on_request(step, self._token_ids_T.tolist(), embeddings_TD))

    def before_attention(self, step: int, layer: int, x_TD: Tensor) -> None:
        """The hidden state that enters the decoder layer of MoE layer ``layer``."""
        self._act(self._predictor.before_attention(step, layer, x_TD))

    def detail(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> RoutingDetail | None:
        """Return what the event of a layer must carry for the parts; None if counts are enough."""
        needs = self._details
        if not needs:
            return None
        scores_TE = None
        if "scores" in needs:
            assert self._gates is not None
            scores_TE = self._gates[layer](x_TD)
        known = self._token_ids_T is not None and len(self._token_ids_T) == len(ids_TK)
        return RoutingDetail(
            ids_TK=ids_TK.numpy(force=True) if "ids" in needs else None,
            weights_TK=weights_TK.float().numpy(force=True) if "weights" in needs else None,
            scores_TE=scores_TE,
            gate_input_TD=x_TD if "gate_input" in needs else None,
            token_ids_T=self._token_ids_T if known else None,
        )

    def routed(self, event: RoutingEvent) -> None:
        """A router has decided, nothing is requested yet: reads that came to nothing lose their turn."""
        if not self._queued:
            return
        assert self._prefetcher is not None
        stale, self._queued = self._prefetcher.after_routing(event, self._queued, self._layers)
        for key in stale:
            self._store.postpone(key)

    def after_gate(self, event: RoutingEvent) -> None:
        """All misses of the event have been requested: predict and read ahead."""
        if "token_ids" in self._needs and (event.detail is None or event.detail.token_ids_T is None):
            return
        forecasts = self._predictor.after_gate(event)
        if event.layer == self._last_layer:
            forecasts = [*forecasts, *self._predictor.end_step(event.step)]
        self._act(forecasts)

    def _act(self, forecasts: list[Forecast]) -> None:
        """Hand forecasts to the caches, and queue what the prefetcher asks for."""
        if not forecasts:
            return
        self._store.forecast(forecasts)
        if self._prefetcher is None:
            return
        room = self._prefetcher.room(self._slots, self._top_k, len(self._queued))
        if not room:
            return
        for fetch in self._prefetcher.plan(forecasts, self._store.holds, room):
            key = fetch.what(self._layers)
            if self._store.request(key, fetch.priority):
                self._queued.add(key)
