"""Layer-aware least recently used: the default cache.

Each layer has a quota of slots. A layer over its quota loses its own least recently used expert, so that no
layer can flush another (sequential flooding: offloading survey design, fact 4). A prompt sets recency by
popularity: among the experts of one prompt chunk those with the most tokens stay, which warms the cache for
decoding (the prefill statistics of DAOP, arXiv 2501.10375, and KTransformers, without their swap).
"""

from collections.abc import Callable, Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.protocol import CachePolicy
from gangline.policies.caches.quotas import layer_quotas


class LayerLRU(CachePolicy):
    """Least recently used within the layer that is furthest over its quota."""

    exact = True

    def __init__(self, slots: int, top_k: Sequence[int], experts: Sequence[int]) -> None:
        self.quotas = layer_quotas(slots, top_k, experts)
        self._resident: list[set[int]] = [set() for _ in self.quotas]
        self._last_use: list[dict[int, tuple[int, int]]] = [{} for _ in self.quotas]
        self._step = 0

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Refresh the recency of every expert of the event; in a prompt popularity breaks the tie."""
        self._step = event.step
        last = self._last_use[event.layer]
        for expert, count in zip(event.experts, event.counts, strict=True):
            last[expert] = (event.step, count if event.phase == "prefill" else 0)

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident; one that no event asked for yet counts as used just now."""
        self._resident[key.layer].add(key.expert)
        last = self._last_use[key.layer]
        last[key.expert] = max(last.get(key.expert, (0, 0)), (self._step, 0))

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident."""
        self._resident[key.layer].discard(key.expert)

    def victim(self, layer: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """Return the least recently used key of the layer furthest over its quota, counting the newcomer."""
        excess = [len(resident) - quota for resident, quota in zip(self._resident, self.quotas, strict=True)]
        excess[layer] += 1
        over = sorted((i for i, e in enumerate(excess) if e > 0), key=lambda i: (-excess[i], i != layer))
        for candidate in over:
            last = self._last_use[candidate]
            for expert in sorted(self._resident[candidate], key=lambda e: (last[e], e)):
                key = ExpertKey(candidate, expert)
                if evictable(key):
                    return key
        return None
