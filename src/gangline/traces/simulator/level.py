"""One tier of slots in the simulation: what is resident, what is on its way, who must go.

It follows the engine's store step by step: hits of an event are decided and leased before any of its misses
evicts something, a leased expert is never a victim, one on its way may be, and a policy that wants to wait
is overruled only when the event could not go on.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gangline.core.errors import UsageError
from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.core.precision import Precision
from gangline.core.tiers import Priority
from gangline.traces.simulator.link import Link, Transfer
from gangline.traces.simulator.machine import SimLink

if TYPE_CHECKING:
    from gangline.policies.caches import CachePolicy


@dataclass(frozen=True)
class LevelSpec:
    """One tier of expert slots and the link that fills it from the tier below.

    Attributes:
        name: for reports, for example ``host``.
        slots: experts that it holds.
        policy: the very cache policy object that an engine would use; fresh for every run.
        link: from the tier below; the last level's link comes from where all experts lie.
        bypass: whether a miss may pass through without a slot if the policy does not admit it.
    """

    name: str
    slots: int
    policy: "CachePolicy"
    link: SimLink = field(default_factory=SimLink)
    bypass: bool = True


class Level:
    """The state of one tier.

    Attributes:
        evictions: experts that gave up their slot.
        prefetched: residents that a prefetch brought and no event has used yet, with their bytes.
        useful_bytes, wasted_bytes: of prefetches that an event used, or that left unused.
    """

    def __init__(
        self,
        spec: LevelSpec,
        expert_bytes: Sequence[int],
        below: "Level | None",
        link: Link | None = None,
    ) -> None:
        if spec.slots < 1:
            raise UsageError(f"{spec.name}: {spec.slots} slots hold no expert; give at least 1")
        self.spec = spec
        self.policy = spec.policy
        self.link = link or Link(spec.link)
        self.below = below
        self.evictions = 0
        self.prefetched: dict[ExpertKey, int] = {}
        self.useful_bytes = self.wasted_bytes = 0
        self._bytes = expert_bytes
        self._arrivals: dict[ExpertKey, Transfer | None] = {}
        self._leases: dict[ExpertKey, int] = {}

    def holds(self, key: ExpertKey) -> bool:
        """Whether an expert has a slot, read or on its way."""
        return key in self._arrivals

    def coming(self, key: ExpertKey) -> bool:
        """Whether an expert has a slot but not all of its bytes."""
        return self._pending(key) is not None

    def lease(self, key: ExpertKey) -> None:
        """Forbid eviction; what is on its way for this expert becomes urgent."""
        self._leases[key] = self._leases.get(key, 0) + 1
        transfer = self._pending(key)
        if transfer is not None:
            transfer.priority = Priority.DEMAND
        if key in self.prefetched:
            self.useful_bytes += self.prefetched.pop(key)

    def release(self, key: ExpertKey) -> None:
        """Allow eviction again."""
        self._leases[key] -= 1
        if not self._leases[key]:
            del self._leases[key]

    def request(
        self,
        key: ExpertKey,
        priority: Priority,
        now: float,
        *,
        must: bool = False,
        spared: Collection[int] = (),
    ) -> bool:
        """Give an expert a slot and start its transfer; False if no slot can be had now.

        Args:
            key: an expert without a slot.
            priority: class of the transfer.
            now: the time.
            must: take any slot that may go if the policy names none.
            spared: experts of the same layer that are no victims unless ``must``.
        """
        self.link.advance(now)
        if not self._make_room(key, must, spared, now):
            return False
        nbytes = self._bytes[key.layer]
        if priority is Priority.PREFETCH:
            self.prefetched[key] = nbytes
        self._arrivals[key] = self._bring(key, priority, now)
        self.policy.admitted(key)
        return True

    def postpone(self, key: ExpertKey, now: float) -> None:
        """Bring an expert that was asked for ahead of time after everything else."""
        self.link.advance(now)
        transfer = self._pending(key)
        if transfer is not None and key not in self._leases:
            transfer.priority = Priority.BACKGROUND

    def pass_through(self, key: ExpertKey, now: float) -> Transfer:
        """Start the transfer of an expert that will have no slot (bypass)."""
        return self._bring(key, Priority.DEMAND, now)

    def wants_bypass(self, key: ExpertKey) -> bool:
        """Whether the policy would rather not keep a missed expert; asked only when no slot is free."""
        if not self.spec.bypass or len(self._arrivals) < self.spec.slots:
            return False
        return not self.policy.admit(key, self._evictable)

    def transfer(self, key: ExpertKey) -> Transfer | None:
        """Return the transfer that brought an expert to its slot, or brings it; None once it is forgotten."""
        return self._arrivals.get(key)

    def close(self) -> None:
        """Count what was prefetched and never used."""
        self.wasted_bytes += sum(self.prefetched.values())
        self.prefetched.clear()

    def _pending(self, key: ExpertKey) -> Transfer | None:
        transfer = self._arrivals.get(key)
        return transfer if transfer is not None and transfer.done is None else None

    def _evictable(self, key: ExpertKey) -> bool:
        return key not in self._leases

    def _make_room(self, key: ExpertKey, must: bool, spared: Collection[int], now: float) -> bool:
        if len(self._arrivals) < self.spec.slots:
            return True

        def evictable(k: ExpertKey) -> bool:
            return self._evictable(k) and not (k.layer == key.layer and k.expert in spared)

        victim = self.policy.victim(key.layer, evictable)
        if victim is None and must:
            victim = next((k for k in self._arrivals if self._evictable(k)), None)
        if victim is None:
            return False
        transfer = self._pending(victim)
        del self._arrivals[victim]
        self.policy.evicted(victim)
        self.evictions += 1
        ahead = self.prefetched.pop(victim, 0)
        if transfer is None or not self.link.cancel(transfer, now):  # what has begun is brought in vain
            self.wasted_bytes += ahead
        return True

    def _bring(self, key: ExpertKey, priority: Priority, now: float) -> Transfer:
        """Start a transfer; the tier below keeps a copy if it has room."""
        source = None
        if self.below is not None:
            below = self.below
            if below.holds(key) or below.request(key, priority, now):
                transfer = below._pending(key)
            else:
                transfer = below.pass_through(key, now)
            source = None if transfer is None else (below.link, transfer)
        return self.link.submit(self._bytes[key.layer], priority, now, source)

    def note(
        self,
        event: RoutingEvent,
        whole: RoutingEvent | None = None,
        chosen: Mapping[int, Precision] | None = None,
    ) -> tuple[int, ...]:
        """Tell the policy of an event and return its hits; tiers below see what is missing here.

        Args:
            event: of the experts that this tier serves.
            whole: that the policy is told of, where ``event`` is a part of it.
            chosen: how experts of ``whole`` are computed; None for all as they are.
        """
        hits = tuple(expert for expert in event.experts if self.holds(ExpertKey(event.layer, expert)))
        self.policy.on_event(whole or event, hits)
        if chosen is not None:
            self.policy.on_precision(whole or event, chosen)
        if self.below is not None and len(hits) < len(event.experts):
            present = set(hits)
            missing = [(e, n) for e, n in zip(event.experts, event.counts, strict=True) if e not in present]
            self.below.note(
                RoutingEvent(
                    event.step,
                    event.layer,
                    event.phase,
                    event.tokens,
                    tuple(e for e, _ in missing),
                    tuple(n for _, n in missing),
                    event.detail,
                )
            )
        return hits
