"""Ranking once for each event gives the victims that looking at every resident each time would give."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.events import RoutingDetail, RoutingEvent
from gangline.core.forecast import Forecast
from gangline.core.geometry import LayerGeometry, MoEGeometry
from gangline.core.keys import ExpertKey
from gangline.policies.caches import make_cache
from policy_replay import random_events

GEOMETRY = MoEGeometry((LayerGeometry(8, 2, 4, 4),) * 3)


def scan(self, group, evictable):
    candidates = (key for key in self._groups[group] if evictable(key))
    return min(candidates, key=lambda key: (self.rank(key), key), default=None)


def victims(policy, slots, events, rng):
    """Replay with forecasts and reads ahead between events; returns who went, in order."""
    resident, gone = set(), []

    def bring(key, kept):
        if key in resident:
            return
        if len(resident) >= slots:
            victim = policy.victim(key.layer, lambda k: k not in kept)
            if victim is None:
                return
            resident.remove(victim)
            policy.evicted(victim)
            gone.append(victim)
        resident.add(key)
        policy.admitted(key)

    for event in events:
        keys = [ExpertKey(event.layer, e) for e in event.experts]
        policy.on_event(event, tuple(k.expert for k in keys if k in resident))
        for key in keys:
            bring(key, set(keys))
        layer = (event.layer + 1) % 3
        experts = tuple(int(e) for e in rng.permutation(8)[:3])
        policy.on_forecast([Forecast(event.step + (layer == 0), layer, experts, (0.5, 0.3, 0.2), 1, "t")])
        for expert in experts[:2]:
            bring(ExpertKey(layer, expert), set(keys))
        if event.layer == 2 and event.step % 9 == 8:
            policy.on_request_start()
    return gone


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["aged-lfu", "hobbit", "mrs", "moe-infinity", "buffering", "read-me"])
@given(seed=st.integers(0, 2**20), slots=st.integers(4, 20))
def test_the_same_victims(name, scope, seed, slots):
    rng = np.random.default_rng(seed)
    events = [
        RoutingEvent(
            e.step, e.layer, e.phase, e.tokens, e.experts, e.counts,
            RoutingDetail(scores_TE=rng.dirichlet(np.ones(8), size=1)),
        )
        for e in random_events(seed, layers=3, steps=25)
    ]  # fmt: skip
    quick, slow = (make_cache(name, slots=slots, geometry=GEOMETRY, scope=scope) for _ in range(2))
    slow.pick = types.MethodType(scan, slow)
    found = [victims(policy, slots, events, np.random.default_rng(seed)) for policy in (quick, slow)]
    assert found[0] == found[1] and found[0]
