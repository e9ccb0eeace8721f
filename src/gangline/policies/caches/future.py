"""When experts are used next, over a sequence of events that is known in advance."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey


class Future:
    """The uses of every expert, and a clock that follows the replay.

    Args:
        events: exactly the events that the policy will be given, in their order.
    """

    def __init__(self, events: Sequence[RoutingEvent]) -> None:
        self._order = [(event.step, event.layer) for event in events]
        self._uses: defaultdict[ExpertKey, list[int]] = defaultdict(list)
        self._now = -1
        for position, event in enumerate(events):
            for expert in event.experts:
                self._uses[ExpertKey(event.layer, expert)].append(position)

    def advance(self, event: RoutingEvent) -> None:
        """Move the clock to ``event``.

        Raises:
            UsageError: it is not the event that was announced.
        """
        self._now += 1
        if self._now >= len(self._order) or self._order[self._now] != (event.step, event.layer):
            raise UsageError(
                f"layer {event.layer} of step {event.step} is not event {self._now} of the future that this "
                "policy was given; build it anew from the very trace that is replayed"
            )

    def next_use(self, key: ExpertKey) -> float:
        """Return the number of the next event after now that uses ``key``; infinity if none does."""
        uses = self._uses.get(key, [])
        index = bisect_right(uses, self._now)
        return uses[index] if index < len(uses) else math.inf

    def uses_before(self, key: ExpertKey, end: int) -> int:
        """Return how many events after now and before event ``end`` use ``key``."""
        uses = self._uses.get(key, [])
        return bisect_left(uses, end) - bisect_right(uses, self._now)

    @property
    def now(self) -> int:
        """Number of the present event."""
        return self._now
