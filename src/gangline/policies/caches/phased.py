"""The default cache: counts of recent uses while the model decodes, layer quotas while a prompt streams.

Decoding keeps what is used often of late, and gives up first what lies in layers just passed, which are
needed again last: :class:`AgedLFU` over one pool of slots. A prompt asks every layer in turn for most of its
experts. Under one ranking each layer would flush another (sequential flooding: offloading survey design, fact
4), and what stays behind would be all of some layers and none of others; so a layer over its quota loses its
own lowest rank then, as under ``layer-lru``.
"""

from collections.abc import Sequence

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.aged_lfu import AgedLFU
from gangline.policies.caches.protocol import Evictable
from gangline.policies.caches.quotas import layer_quotas
from gangline.policies.caches.ranked import over_quota


class PhasedCache(AgedLFU):
    """Ranks as :class:`AgedLFU` does; evicts from one pool while decoding, by layer during prompts.

    Args:
        slots: in all. top_k, experts: of each layer.
        age, nearness: see :class:`AgedLFU`.
    """

    def __init__(
        self,
        slots: int,
        top_k: Sequence[int],
        experts: Sequence[int],
        age: float = 0.97,
        nearness: float = 2.0,
    ) -> None:
        super().__init__(experts, age, nearness)
        self._layer_quotas = layer_quotas(slots, top_k, experts)
        self._held = [0] * len(experts)
        self._prompt = False

    def on_event(self, event: RoutingEvent, hits: tuple[int, ...]) -> None:
        """Count the uses of the event, and note whether a prompt streams."""
        self._prompt = event.phase == "prefill"
        super().on_event(event, hits)

    def admitted(self, key: ExpertKey) -> None:
        """Note a new resident."""
        self._held[key.layer] += 1
        super().admitted(key)

    def evicted(self, key: ExpertKey) -> None:
        """Forget a resident."""
        self._held[key.layer] -= 1
        super().evicted(key)

    def victim(self, layer: int, evictable: Evictable) -> ExpertKey | None:
        """Return the lowest rank of all, or in a prompt that of the layer furthest over its quota."""
        if not self._prompt:
            return super().victim(layer, evictable)
        ranks_LE = self._ranks(0).reshape(self.layers, -1)
        for over in over_quota(self._held, self._layer_quotas, layer):
            key = self.lowest(ranks_LE[over], over * ranks_LE.shape[1], evictable)
            if key is not None:
                return key
        return None
