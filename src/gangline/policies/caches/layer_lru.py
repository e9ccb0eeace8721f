"""Layer-aware least recently used: the default cache.

Each layer has a quota of slots. A layer over its quota loses its own least recently used expert, so that no
layer can flush another (sequential flooding: offloading survey design, fact 4). A prompt sets recency by
popularity: among the experts of one prompt chunk those with the most tokens stay, which warms the cache for
decoding (the prefill statistics of DAOP, arXiv 2501.10375, and KTransformers, without their swap).
"""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.quotas import layer_quotas
from gangline.policies.caches.ranked import Rank, TouchRankedCache


class LayerLRU(TouchRankedCache):
    """Least recently used within the layer that is furthest over its quota."""

    def __init__(self, slots: int, top_k: Sequence[int], experts: Sequence[int]) -> None:
        super().__init__(layer_quotas(slots, top_k, experts))
        self._last_use: dict[ExpertKey, tuple[int, int]] = {}
        self._step = 0

    def rank(self, key: ExpertKey) -> Rank:
        """Return ``(pass, tokens in it if it was a prompt)`` of the last use."""
        return self._last_use[key]

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Refresh the recency of every expert of the event; in a prompt popularity breaks the tie."""
        self._step = event.step
        for expert, count in zip(event.experts, event.counts, strict=True):
            key = ExpertKey(event.layer, expert)
            self._last_use[key] = (event.step, count if event.phase == "prefill" else 0)
            self.touch(key)

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident; one that no event asked for yet counts as used just now."""
        self._last_use[key] = max(self._last_use.get(key, (0, 0)), (self._step, 0))
        super().admitted(key)
