"""Replaying routing events through a cache policy, as the simulator does: hits first, then admissions."""

import random

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey


def replay(policy, slots, events):
    """Return the hits. An expert that gets no slot streams through."""
    resident, hits = set(), 0
    for event in events:
        keys = [ExpertKey(event.layer, e) for e in event.experts]
        present = {key for key in keys if key in resident}
        hits += len(present)
        policy.on_event(event, tuple(sorted(key.expert for key in present)))
        leased = set(keys)
        for key in keys:
            if key in resident:
                continue
            if len(resident) >= slots:
                evictable = lambda k, leased=leased: k not in leased  # noqa: E731
                if not policy.admit(key, evictable):
                    continue
                victim = policy.victim(key.layer, evictable)
                if victim is None:
                    continue
                assert victim in resident and victim not in leased
                resident.remove(victim)
                policy.evicted(victim)
            resident.add(key)
            policy.admitted(key)
    return hits


def event(layer, ids, step=0, counts=None, detail=None, phase="decode"):
    """Make one event; every expert is used by one token unless ``counts`` says otherwise."""
    return RoutingEvent(step, layer, phase, 1, tuple(ids), tuple(counts or [1] * len(ids)), detail)


def steady(layers, ids, steps):
    """The same experts in every layer of every step."""
    return [event(layer, ids, step) for step in range(steps) for layer in range(layers)]


def random_events(seed, layers=2, experts=8, top_k=2, steps=60, sticky=0.5):
    """Events whose experts stay with chance ``sticky``."""
    rng, now = random.Random(seed), {}
    events = []
    for step in range(steps):
        for layer in range(layers):
            ids = now.get(layer)
            if ids is None or rng.random() > sticky:
                ids = tuple(sorted(rng.sample(range(experts), top_k)))
            now[layer] = ids
            events.append(event(layer, ids, step))
    return events
