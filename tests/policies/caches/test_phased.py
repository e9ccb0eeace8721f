"""The default cache: one pool by recent uses while it decodes, even layers after a prompt."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gangline.core.events import RoutingEvent
from gangline.core.keys import ExpertKey
from gangline.policies.caches.aged_lfu import AgedLFU
from gangline.policies.caches.phased import PhasedCache
from gangline.policies.caches.quotas import layer_quotas
from policy_replay import random_events, replay

LAYERS, EXPERTS, TOP_K = 4, 8, 2


def phased(slots, layers=LAYERS):
    return PhasedCache(slots, [TOP_K] * layers, [EXPERTS] * layers)


@given(st.integers(0, 10**6), st.integers(TOP_K, LAYERS * EXPERTS), st.floats(0, 1))
def test_it_is_one_pool_while_it_decodes(seed, slots, sticky):
    events = random_events(seed, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, sticky=sticky)
    assert all(event.phase == "decode" for event in events)
    assert replay(phased(slots), slots, events) == replay(AgedLFU([EXPERTS] * LAYERS), slots, events)


def prompt(step, layer, counts):
    used = tuple(np.flatnonzero(counts).tolist())
    return RoutingEvent(step, layer, "prefill", 64, used, tuple(counts[list(used)].tolist()))


def stream(cache, slots, events):
    """Replay prompts one expert at a time, as they stream through few slots; returns who is left."""
    held: set[ExpertKey] = set()
    for event in events:
        cache.on_event(event, tuple(e for e in event.experts if ExpertKey(event.layer, e) in held))
        for expert in event.experts:
            key = ExpertKey(event.layer, expert)
            if key in held:
                continue
            if len(held) == slots:
                victim = cache.victim(event.layer, lambda _: True)
                held.remove(victim)
                cache.evicted(victim)
            held.add(key)
            cache.admitted(key)
    return held


@given(st.integers(0, 10**6), st.integers(LAYERS * TOP_K + TOP_K, LAYERS * EXPERTS - 1))
def test_a_prompt_leaves_every_layer_its_quota(seed, slots):
    rng = np.random.default_rng(seed)
    events = [prompt(s, layer, rng.integers(1, 9, EXPERTS)) for s in range(3) for layer in range(LAYERS)]
    held = Counter(key.layer for key in stream(phased(slots), slots, events))
    quotas = layer_quotas(slots, [TOP_K] * LAYERS, [EXPERTS] * LAYERS)
    assert all(held[layer] >= quota for layer, quota in enumerate(quotas))
    alone = Counter(k.layer for k in stream(AgedLFU([EXPERTS] * LAYERS), slots, events))
    assert sum(held.values()) == sum(alone.values()) == slots


def test_a_prompt_keeps_what_it_uses_most():
    cache, slots = phased(LAYERS * 3 + TOP_K), LAYERS * 3 + TOP_K
    counts = np.array([1, 9, 2, 8, 3, 7, 4, 6])
    held = stream(cache, slots, [prompt(1, layer, counts) for layer in range(LAYERS)])
    for layer in range(LAYERS - 1):
        kept = sorted(key.expert for key in held if key.layer == layer)
        assert {1, 3} <= set(kept)
