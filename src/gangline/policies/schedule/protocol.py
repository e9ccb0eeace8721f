"""What a schedule of one layer says."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from gangline.core.cost import CostTable
from gangline.core.events import RoutingEvent


class Place(Enum):
    """Where an expert of an event is computed."""

    CPU = "cpu"
    GPU_RESIDENT = "gpu"
    GPU_FETCH = "fetch"


@dataclass(frozen=True)
class Assignment:
    """The schedule of one event.

    Attributes:
        place: where each expert is computed.
        gpu_order: experts of the GPU, in the order in which it runs (and fetches) them.
        cpu_order: experts of the CPU, in order.
        seconds: time until the last one is done, on the cost table's clock.
    """

    place: dict[int, Place]
    gpu_order: tuple[int, ...]
    cpu_order: tuple[int, ...]
    seconds: float


class Scheduler(Protocol):
    """Divides the experts of one event between CPU and GPU; exact, for sums run in ascending expert id."""

    exact: bool = True

    def assign(self, event: RoutingEvent, resident: set[int], cost: CostTable) -> Assignment:
        """Return the schedule.

        Args:
            event: the routing of one layer.
            resident: experts of this layer whose weights are on the GPU.
            cost: measured costs.
        """
        ...


def tokens_of(event: RoutingEvent) -> dict[int, int]:
    """Return the tokens of each expert of an event."""
    return dict(zip(event.experts, event.counts, strict=True))


def timed(
    gpu_order: tuple[int, ...],
    cpu_order: tuple[int, ...],
    tokens: Mapping[int, int],
    resident: set[int],
    cost: CostTable,
) -> Assignment:
    """Run two orders on the clocks of GPU, CPU and link, the link in the GPU's order, and time them."""
    gpu = link = 0.0
    for position, expert in enumerate(gpu_order):
        if expert not in resident:
            link += cost.t_move()
            gpu = max(gpu, link)
        gpu += cost.t_gpu(tokens[expert]) + (0.0 if position else cost.gpu_first)
    cpu = sum(cost.t_cpu(tokens[expert]) for expert in cpu_order) + (cost.cpu_first if cpu_order else 0.0)
    place = {e: Place.GPU_RESIDENT if e in resident else Place.GPU_FETCH for e in gpu_order}
    place.update(dict.fromkeys(cpu_order, Place.CPU))
    return Assignment(place, gpu_order, cpu_order, max(gpu, cpu))
