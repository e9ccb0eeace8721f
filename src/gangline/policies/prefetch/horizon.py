"""How many layers ahead to prefetch, adapted while running.

The other "ExpertFlow" (adaptive expert scheduling and memory coordination, arXiv 2510.26730): start from
``experts * S / (B t_layer)``, the layers that pass while one layer's experts are moved; one more when stalls
exceed a threshold, one less when too much was fetched in vain.
"""

import math


class AdaptiveHorizon:
    """Layers to look ahead.

    Args:
        experts: experts of one layer to move.
        t_expert: seconds to move one expert.
        t_layer: seconds of one layer.
        limit: most layers ahead.
        stall: share of the time spent waiting from which to look further ahead.
        waste: share of prefetched bytes not used from which to look less far.
    """

    def __init__(
        self,
        experts: int,
        t_expert: float,
        t_layer: float,
        limit: int,
        *,
        stall: float = 0.05,
        waste: float = 0.5,
    ) -> None:
        self.limit, self.stall, self.waste = limit, stall, waste
        self.layers = max(1, min(limit, math.ceil(experts * t_expert / t_layer)))

    def observe(self, stalled: float, wasted: float) -> int:
        """Adapt to the shares ``stalled`` and ``wasted`` of the last steps.

        Return the layers to look ahead.
        """
        if stalled > self.stall:
            self.layers = min(self.limit, self.layers + 1)
        elif wasted > self.waste:
            self.layers = max(1, self.layers - 1)
        return self.layers
