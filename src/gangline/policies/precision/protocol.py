"""The protocol of precision policies."""

from collections.abc import Collection, Mapping
from typing import Protocol

from gangline.core.events import Need, RoutingEvent
from gangline.core.precision import Precision


class PrecisionPolicy(Protocol):
    """Chooses how well each expert of an event is computed.

    Attributes:
        exact: True only if it always chooses HIGH.
        needs: what events must carry.
    """

    exact: bool = False
    needs: Collection[Need] = frozenset()

    def choose(self, event: RoutingEvent, resident: Mapping[int, Precision]) -> dict[int, Precision]:
        """Return the precision of every expert of the event.

        Args:
            event: the routing.
            resident: experts of this layer that are there, with their best copy.
        """
        ...
