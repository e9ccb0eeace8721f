"""Fiddler's rule: run a missed expert on the CPU unless its tokens repay the copy.

"Fiddler: CPU-GPU Orchestration for Fast Inference of Mixture-of-Experts Models" (arXiv 2402.07033). A missed
expert with n tokens runs on the CPU if ``t_cpu(n) < t_move + t_gpu(n)``, else it is fetched; resident
experts run on the GPU. In decoding that is nearly always the CPU. The baseline that every scheduler must
beat.
"""

from gangline.core.cost import CostTable
from gangline.core.events import RoutingEvent
from gangline.policies.schedule.protocol import Assignment, Scheduler, timed, tokens_of


class Fiddler(Scheduler):
    """Decides for each missed expert alone."""

    def assign(self, event: RoutingEvent, resident: set[int], cost: CostTable) -> Assignment:
        """Return residents on the GPU, the others where each alone is faster."""
        tokens = tokens_of(event)
        cpu = [
            e
            for e in sorted(tokens)
            if e not in resident and cost.t_cpu(tokens[e]) < cost.t_move() + cost.t_gpu(tokens[e])
        ]
        gpu = sorted(set(tokens).difference(cpu), key=lambda e: (e not in resident, -tokens[e], e))
        return timed(tuple(gpu), tuple(cpu), tokens, resident, cost)
