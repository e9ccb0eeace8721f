"""HybriMoE's two-ended schedule of one layer.

"HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference" (arXiv 2504.05897).
One queue: resident experts by descending tokens, then the others by descending tokens. The GPU takes from
the front (and waits for copies), the CPU from the back; whoever would finish its next expert earlier takes
it. The paper's code has hard-wired times; these come from the measured :class:`CostTable`. We also time the
plans with all experts on the GPU and all on the CPU, and take the best of the three, so the greedy rule
never loses to either.
"""

from collections.abc import Mapping

from gangline.core.cost import CostTable
from gangline.core.events import RoutingEvent
from gangline.policies.schedule.protocol import Assignment, Scheduler, timed, tokens_of


class HybriMoESchedule(Scheduler):
    """The two-ended greedy rule as a scheduler."""

    def assign(self, event: RoutingEvent, resident: set[int], cost: CostTable) -> Assignment:
        """Return the best of greedy, all on the GPU and all on the CPU."""
        return two_ended(tokens_of(event), resident, cost)


def two_ended(tokens: Mapping[int, int], resident: set[int], cost: CostTable) -> Assignment:
    """Return HybriMoE's schedule of experts with ``tokens`` each."""
    queue = sorted(tokens, key=lambda e: (e not in resident, -tokens[e], e))
    plans = [_greedy(queue, tokens, resident, cost), ((), tuple(reversed(queue)))]
    if cost.gpu is not None:
        plans.append((tuple(queue), ()))
    return min((timed(*plan, tokens, resident, cost) for plan in plans), key=lambda plan: plan.seconds)


def _greedy(
    queue: list[int], tokens: Mapping[int, int], resident: set[int], cost: CostTable
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    gpu, cpu, link = 0.0, 0.0, 0.0
    gpu_order: list[int] = []
    cpu_order: list[int] = []
    front, back = 0, len(queue) - 1
    while front <= back:
        moved = 0.0 if queue[front] in resident else cost.t_move()
        waited = max(0.0, link + moved - gpu) if moved else 0.0
        g = waited + cost.t_gpu(tokens[queue[front]]) + (0.0 if gpu_order else cost.gpu_first)
        c = cost.t_cpu(tokens[queue[back]]) + (0.0 if cpu_order else cost.cpu_first)
        if gpu + g <= cpu + c:
            gpu, link = gpu + g, link + moved
            gpu_order.append(queue[front])
            front += 1
        else:
            cpu += c
            cpu_order.append(queue[back])
            back -= 1
    return tuple(gpu_order), tuple(cpu_order)
