"""The ring of layers of SE-MoE: whole layers stream through K slots.

"SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and Inference System" (arXiv
2205.10034), ring memory offloading. Layers 0 to K-1 are loaded; when layer i is computed its slot takes
layer K+i. Whole layers in a known order need no predictor: right for prefill and large batches, E/k times
too many bytes for one user's decoding. K = 2 is double buffering (FreeToken's prefill, FlexGen's zigzag);
more slots absorb jitter, they do not buy bandwidth.
"""

from dataclasses import dataclass

from gangline.core.errors import UsageError


@dataclass(frozen=True)
class RingLoad:
    """Load ``layer`` into ``slot``."""

    layer: int
    slot: int


class LayerRing:
    """Which layer to load into which slot, and when. Passes wrap around.

    Args:
        layers: MoE layers N.
        slots: layer-sized slots K, at least 1 and at most N.
    """

    def __init__(self, layers: int, slots: int) -> None:
        if not 1 <= slots <= layers:
            raise UsageError(f"a ring for {layers} layers needs 1 to {layers} slots, not {slots}")
        self.layers, self.slots = layers, slots
        self._computed = 0

    def start(self) -> list[RingLoad]:
        """Return the first loads."""
        return [RingLoad(i, i) for i in range(self.slots)]

    def slot_of_next(self) -> RingLoad:
        """Return the layer that is computed next and the slot that it lies in."""
        return RingLoad(self._computed % self.layers, self._computed % self.slots)

    def computed(self) -> RingLoad | None:
        """Note that the next layer is done; return the load into its slot, or None if all layers fit."""
        done = self._computed
        self._computed += 1
        if self.slots == self.layers:
            return None
        return RingLoad((done + self.slots) % self.layers, done % self.slots)


def ring_seconds(layers: int, t_compute: float, t_load: float) -> float:
    """Return seconds of a pass in steady state: each layer takes the longer of computing and loading."""
    return layers * max(t_compute, t_load)
