"""HybriMoE's two-ended schedule of one layer.

"HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference" (arXiv 2504.05897).
One queue: resident experts by descending tokens, then the others by descending tokens. The GPU takes from
the front (and waits for copies), the CPU from the back; whoever would finish its next expert earlier takes
it. The paper's code has hard-wired times; these come from the measured :class:`CostTable`. We also time the
plans with all experts on the GPU and all on the CPU, and take the best of the three, so the greedy rule
never loses to either. Alone it can still be a quarter above the best division of few experts, for it never
gives the CPU a light resident expert; up to ``_FEW`` experts :func:`best_prefixes` looks at all sensible
divisions instead.
"""

from collections.abc import Mapping

from gangline.core.cost import CostTable
from gangline.core.events import RoutingEvent
from gangline.policies.schedule.protocol import Assignment, Scheduler, timed, tokens_of

_FEW = 16


class HybriMoESchedule(Scheduler):
    """The two-ended greedy rule as a scheduler, or the best prefixes where experts are few (decoding)."""

    def assign(self, event: RoutingEvent, resident: set[int], cost: CostTable) -> Assignment:
        """Return the schedule of the event's experts."""
        tokens = tokens_of(event)
        divide = best_prefixes if len(tokens) <= _FEW and cost.gpu is not None else two_ended
        return divide(tokens, resident, cost)


def two_ended(tokens: Mapping[int, int], resident: set[int], cost: CostTable) -> Assignment:
    """Return HybriMoE's schedule of experts with ``tokens`` each."""
    queue = sorted(tokens, key=lambda e: (e not in resident, -tokens[e], e))
    plans = [_greedy(queue, tokens, resident, cost), ((), tuple(reversed(queue)))]
    if cost.gpu is not None:
        plans.append((tuple(queue), ()))
    return min((timed(*plan, tokens, resident, cost) for plan in plans), key=lambda plan: plan.seconds)


def best_prefixes(tokens: Mapping[int, int], resident: set[int], cost: CostTable) -> Assignment:
    """Return the best division that gives the GPU the heaviest residents and the heaviest others.

    Where GPU time does not depend on the tokens, which is nearly so for few of them, no division is better:
    swapping a light expert of the GPU for a heavier one of the CPU only shortens the CPU's side.
    """
    queue = sorted(tokens, key=lambda e: (-tokens[e], e))
    here = [e for e in queue if e in resident]
    away = [e for e in queue if e not in resident]
    plans = (
        timed((*here[:r], *away[:m]), (*away[m:], *here[r:]), tokens, resident, cost)
        for r in range(len(here), -1, -1)
        for m in range(len(away) + 1)
    )
    return min(plans, key=lambda plan: plan.seconds)


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
